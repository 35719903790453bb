"""Build the site of the course: lessons as they are stored, panels, and a reference.

    python notebooks/site/build.py                 into build/site; open build/site/index.html
    python notebooks/site/build.py FOLDER

No lesson is run, and nothing is fetched. A warning of Sphinx is an error. Needs `.[site]`.
"""

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path

import claims
import lessons
import nbformat
import panels_data
import plotly
import reference
from sphinx.cmd.build import build_main

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def mathjax() -> Path:
    """MathJax in one file, as its package brings it."""
    [folder] = importlib.util.find_spec("sphinx-mathjax-offline").submodule_search_locations
    return Path(folder) / "static/mathjax/tex-svg-full.js"


def papermill() -> str:
    """The part of the house's page that says how lessons run without a screen."""
    text = (ROOT / "peftlab/README.md").read_text(encoding="utf-8")
    return text.split("\n## Without a screen\n")[1].split("\n## ")[0].strip() + "\n"


def taken(notebooks: list[Path]) -> str:
    """A table of what each lesson takes: parameters, and what was measured on two CPU cores."""
    rows = ["| lesson | parameters and what they are if not told | seconds | GB |"]
    rows += ["| --- | --- | --- | --- |"]
    record = (ROOT / "data/results/lessons_cpu.json").read_text(encoding="utf-8")
    measured = {row["lesson"]: row for row in json.loads(record)["lessons"]}
    for path in notebooks:
        given = lessons.parameters(path).items()
        words = ", ".join(f"`{name} = {value!r}`" for name, value in given)
        row = measured[path.stem]
        cost = f"{row['wall seconds']:.0f} | {row['peak process bytes'] / 1e9:.1f}"
        rows.append(f"| [{path.stem}](lessons/{path.name}) | {words} | {cost} |")
    return "\n".join(rows) + "\n"


def written(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def gather(source: Path) -> None:
    """Write every page, and all that pages load, below `source`."""
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    shutil.copytree(HERE / "pages", source)
    static = source / "_static"
    shutil.copytree(HERE / "static", static)
    for path in (Path(plotly.__file__).parent / "package_data/plotly.min.js", mathjax()):
        shutil.copy(path, static)
    shutil.copy(ROOT / "data/results/five_sites.png", source)

    (static / "lessons").mkdir()
    (source / "lessons").mkdir()
    for path in notebooks:
        nbformat.write(lessons.page(path, static / "lessons"), source / "lessons" / path.name)
    for name in panels_data.PANELS:
        written(static / f"panels/{name}_data.js", panels_data.script(name))

    for name, state in map(lessons.state, lessons.ALIVE):
        place = lessons.place(name, state)
        written(source / f"parts/{name}.md", f"```{{raw}} html\n{place}\n```\n")
    written(source / "parts/papermill.md", papermill())
    written(source / "parts/parameters.md", taken(notebooks))
    contents = "\n".join(f"lessons/{path.stem}" for path in notebooks)
    written(
        source / "parts/lessons.md",
        f"```{{toctree}}\n:caption: Lessons\n:maxdepth: 1\n\n{contents}\n```\n",
    )

    titles = {p.stem[:2]: (lessons.title(p), f"lessons/{p.name}") for p in notebooks}
    written(source / "claims.md", claims.page(titles))
    pages = reference.pages()
    for name, text in pages.items():
        written(source / f"reference/{name}.rst", text)
    listed = "\n   ".join(pages)
    contents = f".. toctree::\n   :maxdepth: 1\n\n   {listed}\n"
    written(source / "reference/index.rst", reference.headed("Reference") + contents)


def build(folder: Path) -> int:
    """Build the site into a folder, which is made anew. Returns Sphinx's status."""
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch).resolve() / "source"
        gather(source)
        settings = ["-D", f"html_static_path={source / '_static'}"]
        quiet = ["-q", "-W", "--keep-going", "-b", "html", "-d", f"{scratch}/doctrees"]
        status = build_main([*quiet, *settings, "-c", str(HERE), str(source), str(folder)])
    (folder / ".nojekyll").touch()
    shutil.rmtree(folder / "_sources", ignore_errors=True)  # pages refer to none
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build/site")
    return build(parser.parse_args().folder.resolve())


if __name__ == "__main__":
    sys.exit(main())
