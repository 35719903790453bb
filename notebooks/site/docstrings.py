"""Docstrings as reStructuredText: the house writes plain text, and indents formulas."""

import re
import textwrap
from collections.abc import Iterator

MATHS, CODE = re.compile(r"\$([^$]+)\$"), re.compile(r"`([^`]+)`")
SPECIAL = re.compile(r"([\\*_|<>`])")


def inline(text: str) -> str:
    """One paragraph: code stays code, formulas become formulas, nothing else is markup."""
    parts = re.split(r"(\$[^$\n]+\$|`[^`\n]+`)", text)
    return "".join(map(_part, parts))


def _part(part: str) -> str:
    if formula := MATHS.fullmatch(part):
        return f":math:`{formula[1]}`\\ "
    if code := CODE.fullmatch(part):
        return f"``{code[1].strip()}``\\ "
    return SPECIAL.sub(r"\\\1", part)


def blocks(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines that are all indented, or all not; empty lines part paragraphs."""
    block: list[str] = []
    for line in lines:
        apart = not line.strip() and not (block and block[0].startswith(" "))
        turned = block and line.strip() and line.startswith(" ") != block[0].startswith(" ")
        if apart or turned:
            if block:
                yield block
            block = []
        if not apart:
            block.append(line)
    if block:
        yield block


def restructured(lines: list[str]) -> list[str]:
    """The lines of a docstring, for Sphinx. What is indented is shown as it stands."""
    made: list[str] = []
    for block in blocks(lines):
        text = "\n".join(block).rstrip()
        if block[0].startswith(" "):
            shown = textwrap.indent(textwrap.dedent(text), "   ")
            kind = "python" if text.lstrip().startswith((">>>", "import ", "from ")) else "text"
            made += [f".. code-block:: {kind}", "", *shown.split("\n"), ""]
        else:
            made += [*inline(text).split("\n"), ""]
    return made


def process(app, what, name, found, options, lines) -> None:
    """Sphinx calls this with each docstring, and reads on in `lines`."""
    lines[:] = restructured(lines)
