"""Many runs compared honestly: rates searched, seeds, intervals, verdicts.

`contest` says what is compared, `search` how a rate is found, `replay` trains many runs side by
side on a GPU, `runs` makes rows of them, `tournament` plays a contest from beginning to end, and
`verdicts` says which differences are more than chance.
"""
