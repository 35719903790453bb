"""What Sphinx, its theme and pandas leave out, for those who hear a page.

axe, which tests/test_site.py runs on every page, names each fault in the docstrings below.
"""

import re
from collections.abc import Callable

from sphinx.writers.html5 import HTML5Translator

FOLDED = re.compile(r"(<a [^>]*>([^<]+)</a><details[^>]*><summary)>")


class Translator(HTML5Translator):
    """Writes a page as Sphinx does, but for two things.

    A signature over several lines is a list of parameters, where Sphinx writes definitions of
    nothing, `<dl>` with `<dd>` alone (axe: definition-list). A cell without content heads no column
    (axe: empty-table-header).
    """

    def visit_desc_parameterlist(self, node) -> None:
        node["begins"] = len(self.body)
        super().visit_desc_parameterlist(node)

    def depart_desc_parameterlist(self, node) -> None:
        super().depart_desc_parameterlist(node)
        if node.get("multi_line_parameter_list"):
            written = self.body[node["begins"] :]
            self.body[node["begins"] :] = [as_list(piece) for piece in written]

    def visit_entry(self, node) -> None:
        super().visit_entry(node)
        if not any(part.children for part in node.children):
            self.body[-1] = self.body[-1].replace("<th", "<td", 1)
            self.context[-1] = self.context[-1].replace("</th", "</td", 1)


def as_list(piece: str) -> str:
    """Tags of definitions, as those of a list; text has no tags, because its `<` are escaped."""
    return re.sub(r"<(/?)dd\b", r"<\1li", re.sub(r"<(/?)dl\b", r"<\1ul", piece))


def named(contents: Callable[..., str]) -> Callable[..., str]:
    """The theme's function that writes the contents beside a page, such that the arrow which
    unfolds the pages below a page has a name (axe: summary-name)."""
    return lambda **how: FOLDED.sub(r'\1 aria-label="pages below \2">', str(contents(**how)))


def without_empty_headings(table: str) -> str:
    """HTML of pandas; the cell over the index heads no column (axe: empty-table-header)."""
    return re.sub(r"<th([^>]*)></th>", r"<td\1></td>", table)


def on_page(app, name, template, context, tree) -> None:
    """Sphinx calls this before each page, after what the theme has connected to the same event."""
    if "generate_toctree_html" in context:
        context["generate_toctree_html"] = named(context["generate_toctree_html"])
