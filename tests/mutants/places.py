"""Where a fault counts, and which lines a test has to run to meet it. Only Python's own parser."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator

Span = tuple[tuple[int, int], tuple[int, int]]  # from (line, column) to before (line, column)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)


class Source:
    """A module's text. Lines count from 1, columns from 0 in characters, as cosmic-ray's do."""

    def __init__(self, text: str):
        self.text, self.lines, self.tree = text, text.splitlines(), ast.parse(text)
        self.words = list(self._words())

    def span(self, node: ast.AST, last: ast.AST | None = None) -> Span:
        last = last or node
        start = self._column(node.lineno, node.col_offset)
        return (node.lineno, start), (
            last.end_lineno,
            self._column(last.end_lineno, last.end_col_offset),
        )

    def _column(self, line: int, offset: int) -> int:
        return len(self.lines[line - 1].encode()[:offset].decode())

    def code_lines(self) -> int:
        """Lines that are neither empty nor a comment nor part of a docstring."""
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        used = set()
        for token in tokens:
            if token.type not in (*silent, tokenize.ENDMARKER):
                used |= set(range(token.start[0], token.end[0] + 1))
        for node in self._docstrings():
            used -= set(range(node.lineno, node.end_lineno + 1))
        return len(used)

    def _docstrings(self) -> Iterator[ast.AST]:
        for node in ast.walk(self.tree):
            if isinstance(node, (*DEFINITIONS, ast.Module)) and ast.get_docstring(node) is not None:
                yield node.body[0]

    def _words(self) -> Iterator[Span]:
        """What only people read: no mutant is drawn here. Annotations, docstrings, imports from
        `__future__`, and what is said by an exception that is raised or by a warning."""
        for node in self._docstrings():
            yield self.span(node)
        for node in ast.walk(self.tree):
            if isinstance(node, FUNCTIONS) and node.returns:
                yield self.span(node.returns)
            if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation:
                yield self.span(node.annotation)
            if isinstance(node, ast.ImportFrom) and node.module == "__future__":
                yield self.span(node)
            call = node.exc if isinstance(node, ast.Raise) else node
            warns = isinstance(call, ast.Call) and ast.unparse(call.func) == "warnings.warn"
            if isinstance(call, ast.Call) and (warns or call is not node):
                if said := [*call.args, *(keyword.value for keyword in call.keywords)]:
                    yield self.span(said[0], said[-1])

    def counts(self, span: Span) -> bool:
        return not any(start <= span[0] and span[1] <= end for start, end in self.words)

    def around(self, span: Span) -> list[range]:
        """Lines that run when the mutated place does, from near to far: of the first of them that a
        test runs, all tests count. What runs at import (a default, a decorator, a constant) is met
        by the tests that run what it belongs to: its function, else its class, else the module."""
        line, everything = span[0][0], range(1, len(self.lines) + 1)
        inside = [n for n in ast.walk(self.tree) if isinstance(n, ast.stmt) and line in _lines(n)]
        functions = [node for node in inside if isinstance(node, FUNCTIONS)]
        runs_later = any(line >= node.body[0].lineno for node in functions) or self._in_lambda(span)
        bodies = (
            range(node.body[0].lineno, node.end_lineno + 1)
            for node in inside
            if isinstance(node, DEFINITIONS)
        )
        definitions = [*sorted(bodies, key=len), everything]
        if not runs_later:
            return definitions
        here = range(line, span[1][0] + 1)
        heads = (head for head in map(_head, inside) if line in head)  # `except` has none
        return [here, min(heads, key=len, default=here), *definitions]

    def _in_lambda(self, span: Span) -> bool:
        lambdas = (self.span(n) for n in ast.walk(self.tree) if isinstance(n, ast.Lambda))
        return any(start <= span[0] and span[1] <= end for start, end in lambdas)


def _lines(node: ast.stmt) -> range:
    """A statement's lines, its decorators included."""
    decorators = getattr(node, "decorator_list", [])
    return range(min([node.lineno, *(d.lineno for d in decorators)]), node.end_lineno + 1)


def _head(node: ast.stmt) -> range:
    """A statement's lines; of one that holds others, those before the first of them."""
    lines, body = _lines(node), getattr(node, "body", None)
    return range(lines.start, max(lines.start + 1, body[0].lineno)) if body else lines
