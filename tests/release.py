"""What a release says:  python tests/release.py v0.1.0

Prints the part of CHANGELOG.md about that version. The exit status is 1 if the tag is not the
version that pyproject.toml has, if CHANGELOG.md has no such part, or if a notebook was stored by
another version.
"""

import json
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def notes(tag: str, root: Path = ROOT) -> str:
    """The part of CHANGELOG.md about that tag. Raises ValueError if it is not this version."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if tag != f"v{project['version']}":
        raise ValueError(f"the tag is {tag}, the package is v{project['version']}")
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        ran = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("peftlab", {})
        if ran.get("version") != project["version"]:
            raise ValueError(f"{path.name} was stored by version {ran.get('version')}")
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    parts = re.split(r"^## ", changes, flags=re.MULTILINE)[1:]
    for part in parts:
        head, _, body = part.partition("\n")
        if head.split()[0] == project["version"] and body.strip():
            return body.strip()
    raise ValueError(f"CHANGELOG.md says nothing about {project['version']}")


if __name__ == "__main__":
    try:
        print(notes(sys.argv[1]))
    except ValueError as error:
        sys.exit(str(error))
