"""Paths of the data files that come with peftlab."""

from pathlib import Path


def data_path(*parts: str) -> Path:
    """A path below `data/`: inside an installed package, or in the checkout beside it."""
    package = Path(__file__).parent.parent
    inside = package / "data"
    return (inside if inside.is_dir() else package.parent / "data").joinpath(*parts)
