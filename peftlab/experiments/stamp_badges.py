"""Point a fork's badges and set-up cells at its own repository.

    python -m peftlab.experiments.stamp_badges --repository https://github.com/you/peftlab

The address lives in `peftlab.REPOSITORY`; every other place that shows it (the README and the pages
beside it, the package's metadata, Colab badges and set-up cells in the notebooks) is rewritten to
agree.
"""

import argparse
import re
from pathlib import Path

ADDRESS = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+)")
CONSTANT = re.compile(r'^REPOSITORY = "([^"]+)"', re.MULTILINE)
STAMPED = (
    "*.md",
    ".github/*.md",
    "CITATION.cff",
    "pyproject.toml",
    "peftlab/__init__.py",
    "notebooks/*.ipynb",
)


def slug(repository: str) -> str:
    """The `owner/name` in a GitHub address."""
    match = ADDRESS.fullmatch(repository.removesuffix(".git").rstrip("/"))
    if match is None:
        raise ValueError(
            "a repository is https://github.com/OWNER/NAME (Colab opens no other), "
            f"not {repository!r}"
        )
    return match[1]


def stamp(root: Path, repository: str) -> list[Path]:
    """Rewrite the repository's address in every place that shows it; returns the files changed."""
    old = slug(CONSTANT.search((root / "peftlab/__init__.py").read_text(encoding="utf-8"))[1])
    new = slug(repository)
    # github.com/OWNER/NAME in links and installs, github/OWNER/NAME in Colab's addresses, gh/ in
    # Binder's.
    shown = re.compile(rf"((?:github(?:\.com)?|/gh)/){re.escape(old)}(?![\w-])")
    changed = []
    for pattern in STAMPED:
        for path in sorted(root.glob(pattern)):
            text = path.read_text(encoding="utf-8")
            stamped = shown.sub(rf"\g<1>{new}", text)
            if stamped != text:
                path.write_text(stamped, encoding="utf-8")
                changed.append(path)
    return changed


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repository", required=True, help="https://github.com/OWNER/NAME")
    parser.add_argument("--root", type=Path, default=Path("."))
    options = parser.parse_args(arguments)
    for path in stamp(options.root, options.repository):
        print(path)


if __name__ == "__main__":
    main()
