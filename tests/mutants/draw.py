"""Small faults of cosmic-ray's operators, drawn by a seed.

A place is where one kind of operator can change something: a number, a comparison, a condition, a
loop, a decorator. Places are drawn with equal chances, each module's share by its lines of code;
then one of the changes that are possible there is drawn. (`a + b` has eleven changes and
`not a` four, and most of the eleven raise TypeError at once: drawn by change, they would count
most.) A change is no mutant if it does not compile, if the compiler warns of it (`is` with a
literal), or if it leaves the syntax tree as it was.
"""

from __future__ import annotations

import ast
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

from mutants.places import Source, Span

MUTATED = (
    "peftlab/methods/*.py",
    "peftlab/sites/*.py",
    "peftlab/exercises/*.py",
    "peftlab/tuned/saving.py",
    "peftlab/tuned/folders.py",
    "peftlab/accounting.py",
)


@dataclass(frozen=True)
class Mutant:
    """One change: the operator's `occurrence`-th in a module, the lines of it, before and after."""

    module: str
    operator: str
    occurrence: int
    line: int
    before: str
    after: str
    lines: tuple[tuple[int, int], ...]  # where a test meets it, from near to far

    @property
    def key(self) -> str:
        return f"{self.module} {self.operator} {self.occurrence}: {self.before} -> {self.after}"

    def source(self, text: str) -> str:
        return changed(text, self.operator, self.occurrence)


def changed(text: str, operator: str, occurrence: int) -> str | None:
    return mutate_code(text, plugins.get_operator(operator)(), occurrence)


def places(source: Source) -> dict[tuple[str, Span], list[tuple[str, int]]]:
    """For each kind of operator and span the (operator, occurrence) that change something there."""
    found: dict[tuple[str, Span], list[tuple[str, int]]] = {}
    nodes = list(ast_nodes(get_ast(source.text)))
    for name in plugins.operator_names():
        operator = plugins.get_operator(name)
        if operator.arguments():
            continue
        kind, occurrence = name.split("_")[0], 0
        for node in nodes:
            try:
                spans = list(operator().mutation_positions(node))
            except (AttributeError, IndexError):  # an `except` that the operator does not know
                continue
            for span in spans:
                if source.counts(span):
                    found.setdefault((kind, span), []).append((name, occurrence))
                occurrence += 1
    return found


def mutants(tree: Path, number: int, seed: int) -> list[Mutant]:
    """`number` mutants in random order, so that the first of them are a fair sample too."""
    modules = sorted(path for pattern in MUTATED for path in tree.glob(pattern))
    sources = {
        path.relative_to(tree).as_posix(): Source(path.read_text("utf-8")) for path in modules
    }
    lines = {name: source.code_lines() for name, source in sources.items()}
    streams = {name: of_module(name, source, seed) for name, source in sources.items()}
    drawn: list[Mutant] = []
    for name, quota in shares(lines, number).items():
        drawn += islice(streams[name], quota)
    for name in sorted(lines, key=lines.get, reverse=True):  # where a module has too few places
        drawn += islice(streams[name], min(1, number - len(drawn)))
    random.Random(seed).shuffle(drawn)
    return drawn


def of_module(name: str, source: Source, seed: int) -> Iterator[Mutant]:
    """The mutants of one module, one for each place, in random order."""
    rng = random.Random(f"{seed} {name}")
    found = sorted(places(source).items())
    rng.shuffle(found)
    for (_, span), ways in found:
        if mutant := one(name, source, span, rng.sample(ways, len(ways))):
            yield mutant


def shares(sizes: dict[str, int], number: int) -> dict[str, int]:
    """`number` divided in proportion: what is left of it goes to the largest remainders."""
    exact = {name: number * size / sum(sizes.values()) for name, size in sizes.items()}
    whole = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: whole[name] - exact[name])
    for name in by_remainder[: number - sum(whole.values())]:
        whole[name] += 1
    return whole


def one(name: str, source: Source, span: Span, ways: list[tuple[str, int]]) -> Mutant | None:
    """The first of `ways` that is a mutant."""
    for operator, occurrence in ways:
        text = changed(source.text, operator, occurrence)
        try:
            with warnings.catch_warnings(action="error", category=SyntaxWarning):
                if text is None or ast.dump(ast.parse(text)) == ast.dump(source.tree):
                    continue
                compile(text, name, "exec")
        except SyntaxError:  # and what the compiler warned of
            continue
        new, first = text.splitlines(), span[0][0] - 1
        added = len(new) - len(source.lines)
        before, after = source.lines[first : span[1][0]], new[first : span[1][0] + added]
        around = tuple((r.start, r.stop - 1) for r in source.around(span))
        said = (" ".join(" ".join(part).split()) for part in (before, after))
        return Mutant(name, operator, occurrence, span[0][0], *said, around)
    return None
