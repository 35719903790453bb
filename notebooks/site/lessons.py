"""A stored lesson as a page: its figures alive, its panels where they need no kernel."""

import ast
import base64
import html
import inspect
import json
import posixpath
import re
from pathlib import Path

import nbformat
from accessible import without_empty_headings

import peftlab
from peftlab import panels
from peftlab.experiments.run_notebooks import PNG, figure_in

BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\(([^)]*)\)")
LINK = re.compile(r"\]\(((?!https?:|#)[^)\s]+)\)")
# The panels that the page itself computes, and what their arguments are called there.
ALIVE = {
    "count_explorer": ("count", {"model": "model", "method": "method", "targets": "targets"}),
    "memory_explorer": ("memory", {"model": "model", "batch": "rows", "length": "tokens"}),
    "code_explorer": ("codes", {}),
    "rank_lab": ("rank", {"r": "r", "alpha": "alpha", "scale": "scale"}),
}


def begins(name: str) -> dict:
    """The state in which a panel of the page begins, where nobody says otherwise."""
    if name == "count":
        return {"size": panels.CHOICES["LoRA"].start}
    if name == "codes":
        view = inspect.signature(panels.code_view).parameters
        chosen = {"type": "quant_type", "block": "block_size", "double": "double_quant"}
        return {"weight": "a drawn normal"} | {k: view[v].default for k, v in chosen.items()}
    return {}


def state(function: str, call: ast.Call | None = None) -> tuple[str, dict]:
    """The page's name of a panel, and the state that this call asks for."""
    name, renamed = ALIVE[function]
    bound = inspect.signature(getattr(panels, function))
    given = {}
    if call is not None and renamed:
        words = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        given = bound.bind(*map(ast.literal_eval, call.args), **words).arguments
    usual = {key: p.default for key, p in bound.parameters.items() if key in renamed}
    found = begins(name) | {renamed[key]: value for key, value in (usual | given).items()}
    if name == "count":
        found["size"] = panels.CHOICES[found["method"]].start
        found["targets"] = list(found["targets"])
    return name, found


def panel_of(source: str) -> tuple[str, dict] | None:
    """The panel that a cell ends with, if the page can compute it."""
    try:
        last = ast.parse(source).body[-1]
    except (SyntaxError, IndexError):
        return None
    call = getattr(last, "value", None)
    function = getattr(getattr(call, "func", None), "attr", None)
    return state(function, call) if function in ALIVE else None


def place(name: str, begin: dict, inside: str = "") -> str:
    """The element that a panel is built in; `inside` is shown until then."""
    begin = html.escape(json.dumps(begin, ensure_ascii=False))
    return f'<div class="peftlab-panel" data-panel="{name}" data-state="{begin}">{inside}</div>'


def drawing(figure: dict, picture: str, words: str) -> str:
    """A figure: its picture, and its data for the script that draws it."""
    data = json.dumps(figure, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    label = html.escape(" ".join(words.split()))
    return (
        f'<div class="peftlab-figure" role="figure" aria-label="{label}">{picture}'
        f'<script type="application/json">{data}</script></div>'
    )


def shown(cell, output, name: str, folder: Path) -> None:
    """Replace a figure among an output's data by what the page draws; its picture goes to a file
    of this name. In a table, only what heads something is a heading."""
    data = output["data"]
    if "text/html" in data:
        data["text/html"] = without_empty_headings(data["text/html"])
    figure = figure_in(data)
    if figure is None or PNG not in data:
        return
    about = output.get("metadata", {}).get(PNG, {})
    title = figure.get("layout", {}).get("title", {}).get("text", "")
    words = about.get("alt") or re.sub("<[^>]*>", " ", title) or "figure"
    (folder / f"{name}.png").write_bytes(base64.b64decode(data[PNG]))
    width = f' width="{about["width"]}"' if "width" in about else ""
    alt = html.escape(" ".join(words.split()))
    picture = f'<img src="../_static/lessons/{name}.png" alt="{alt}"{width}>'
    panel = panel_of(cell.source)
    made = place(*panel, picture) if panel else drawing(figure, picture, words)
    output["data"] = nbformat.from_dict({"text/html": made})
    output["metadata"] = nbformat.from_dict({})


def linked(text: str) -> str:
    """Links of a lesson as the site has them: other lessons are pages, other files are on GitHub.
    The badge becomes words, because its picture lies on another machine."""

    def elsewhere(match: re.Match) -> str:
        target = match[1]
        if re.fullmatch(r"\d\d_\w+\.ipynb(#.*)?", target):
            return match[0]
        path = posixpath.normpath(posixpath.join("notebooks", target))
        return f"]({peftlab.REPOSITORY}/blob/main/{path})"

    return LINK.sub(elsewhere, BADGE.sub(r"[Open in Colab](\1)", text))


def page(path: Path, pictures: Path) -> nbformat.NotebookNode:
    """The lesson in this file as a page; its pictures are written into a folder."""
    notebook = nbformat.read(path, as_version=4)
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            cell.source = linked(cell.source)
        elif "find_spec(" in cell.source:  # what only a notebook needs is folded
            cell.metadata["tags"] = [*cell.metadata.get("tags", ()), "hide-input"]
        for i, output in enumerate(cell.get("outputs", [])):
            if "data" in output:
                shown(cell, output, f"{path.stem}_{number:03}_{i}", pictures)
    return notebook


def title(path: Path) -> str:
    """The first heading of a lesson."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "".join(cells[0]["source"]).split("\n")[0].removeprefix("# ")


def parameters(path: Path) -> dict[str, object]:
    """What a lesson takes, and what it takes if nobody says otherwise."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    [cell] = [c for c in cells if "parameters" in c["metadata"].get("tags", ())]
    taken: dict[str, object] = {}
    exec("".join(cell["source"]), {}, taken)
    return taken
