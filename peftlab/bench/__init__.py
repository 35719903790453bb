"""Many runs compared honestly: rates searched, seeds, intervals, verdicts.

`contest` says what is compared, `search` how a rate is found, `replay` trains many runs side by
side, `runs` makes rows of them, `tournament` plays a contest from beginning to end, `verdicts` says
which differences are more than chance, and `results` reads what is recorded.
"""
