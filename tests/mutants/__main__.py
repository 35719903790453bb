"""The commands."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from mutants import __doc__ as about
from mutants.workshop import CHECKOUT, Workshop


def drawn(workshop: Workshop, number: int, seed: int) -> list:
    """The mutants of a seed, kept as long as no module changes."""
    from mutants.draw import MUTATED, Mutant, mutants

    paths = sorted(path for pattern in MUTATED for path in workshop.tree.glob(pattern))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]
    path = workshop.folder / f"drawn_{number}_{seed}_{digest}.json"
    if not path.exists():
        rows = [vars(mutant) for mutant in mutants(workshop.tree, number, seed)]
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    return [Mutant(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mutants", description=about.splitlines()[0])
    parser.add_argument("do", choices=["cover", "run", "write"])
    parser.add_argument("only", nargs="*", help="cover: these test files, again")
    parser.add_argument(
        "--again",
        type=float,
        metavar="SECONDS",
        help="run: try survivors again, each against as many of its tests as take so long",
    )
    parser.add_argument("--first", type=int, help="run: stop after so many of the mutants")
    parser.add_argument("--number", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=CHECKOUT / "build" / "mutants")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "data/results/mutants.json")
    options = parser.parse_args(arguments)
    workshop = Workshop(options.work)
    workshop.refresh()
    if options.do == "cover":
        from mutants.cover import cover

        workshop.settle()
        cover(workshop, options.only)
        return
    from mutants.run import Trials

    mutants = drawn(workshop, options.number, options.seed)
    if options.do == "run":
        workshop.settle()
        again = () if options.again is None else ("survived", "no test", "killed by time")
        Trials(workshop, options.again or 0).run(mutants[: options.first], again)
    else:
        from mutants.report import write

        write(workshop, mutants, options)


if __name__ == "__main__":
    main()
