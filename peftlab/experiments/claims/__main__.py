"""Prints the claims: `python -m peftlab.experiments.claims`, with `--check` every verdict anew.

--lesson 05     of one lesson            --verdict wrong    of one verdict
--decides       that change a decision   --source S4        of one source
--id S4-46      one claim, in full       --changed          whose verdict follows no more
"""

import argparse
from collections import Counter
from collections.abc import Sequence

from peftlab.experiments.claims import DECIDED, VERDICTS, Claim, check, load


def main(words: Sequence[str] | None = None) -> int:
    """Print what was asked for. Returns how many verdicts are not those that follow."""
    parser = argparse.ArgumentParser(prog="python -m peftlab.experiments.claims")
    parser.add_argument("--lesson", help="two digits")
    parser.add_argument("--verdict", choices=VERDICTS)
    parser.add_argument("--source", choices=[f"S{n}" for n in range(5)])
    parser.add_argument("--id", help="one claim, in full")
    parser.add_argument("--decides", action="store_true", help="those that change a decision")
    parser.add_argument("--check", action="store_true", help="derive every verdict anew")
    parser.add_argument("--changed", action="store_true", help="whose verdict follows no more")
    asked = parser.parse_args(words)
    chosen = [
        claim
        for claim in load()
        if all(
            getattr(asked, name) in (None, getattr(claim, name))
            for name in ("lesson", "verdict", "source", "id")
        )
        and (claim.decides or not asked.decides)
    ]
    if asked.changed:
        chosen = [claim for claim in chosen if check(claim).verdict != claim.verdict]
    changed = 0
    for claim in chosen:
        print(row(claim))
        if asked.check or asked.id or asked.changed:
            found = check(claim)
            changed += found.verdict != claim.verdict
            print(f"       → {found.verdict}: {found.sentence}")
    print(counts(chosen))
    return changed


def row(claim: Claim) -> str:
    """A claim in two lines: what is said, and what is right."""
    mark = "!" if claim.decides else " "
    return (
        f"{claim.id}{mark} {claim.lesson}  {claim.verdict:<10}  {claim.says}\n"
        f"       {claim.right}  [{claim.decided_by}; {claim.reference}]"
    )


def counts(chosen: Sequence[Claim]) -> str:
    """How many there are, of which verdict, and what they rest on."""
    verdicts = Counter(claim.verdict for claim in chosen)
    grounds = Counter(claim.decided_by for claim in chosen)
    return (
        f"\n{len(chosen)} claims: "
        + ", ".join(f"{verdicts[word]} {word}" for word in VERDICTS if verdicts[word])
        + ".\nDecided by "
        + ", ".join(f"{word} {grounds[word]}" for word in DECIDED if grounds[word])
        + f". {sum(claim.decides for claim in chosen)} change a decision (!)."
    )


if __name__ == "__main__":
    raise SystemExit(main())
