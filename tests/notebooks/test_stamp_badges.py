"""A fork's badges and set-up cells point at the fork."""

import pytest

from peftlab.experiments.stamp_badges import main, slug, stamp

COLAB = "https://colab.research.google.com/github/{}/blob/main/notebooks/06_lora.ipynb"
OLD, NEW = "peftlab/peftlab", "ada/my.peft-lab"


@pytest.fixture
def tree(tmp_path):
    for folder in ("peftlab", "notebooks", ".github"):
        (tmp_path / folder).mkdir()
    (tmp_path / "peftlab/__init__.py").write_text(f'REPOSITORY = "https://github.com/{OLD}"\n')
    (tmp_path / "README.md").write_text(COLAB.format(OLD) + "\nhttps://github.com/peftlab/other\n")
    (tmp_path / "notebooks/06_lora.ipynb").write_text(
        f"{COLAB.format(OLD)} git+https://github.com/{OLD}.git github.com/{OLD}-extra"
    )
    (tmp_path / "notebooks/notes.ipynb").write_text("no address here")
    (tmp_path / ".github/SECURITY.md").write_text(f"https://mybinder.org/v2/gh/{OLD}/HEAD")
    (tmp_path / "CITATION.cff").write_text(f"repository-code: https://github.com/{OLD}\n")
    return tmp_path


def test_every_place_is_rewritten_and_no_other(tree):
    changed = stamp(tree, f"https://github.com/{NEW}")
    assert sorted(path.name for path in changed) == [
        "06_lora.ipynb",
        "CITATION.cff",
        "README.md",
        "SECURITY.md",
        "__init__.py",
    ]
    assert (tree / ".github/SECURITY.md").read_text() == f"https://mybinder.org/v2/gh/{NEW}/HEAD"
    assert (tree / "CITATION.cff").read_text().endswith(f"/{NEW}\n")
    assert (
        tree / "peftlab/__init__.py"
    ).read_text() == f'REPOSITORY = "https://github.com/{NEW}"\n'
    readme = (tree / "README.md").read_text()
    assert readme == COLAB.format(NEW) + "\nhttps://github.com/peftlab/other\n"
    assert (tree / "notebooks/06_lora.ipynb").read_text() == (
        f"{COLAB.format(NEW)} git+https://github.com/{NEW}.git github.com/{OLD}-extra"
    )


def test_stamping_there_and_back_is_the_identity(tree):
    before = {path: path.read_text() for path in tree.rglob("*.*") if path.is_file()}
    main(["--repository", f"https://github.com/{NEW}.git", "--root", str(tree)])
    main(["--repository", f"https://github.com/{OLD}/", "--root", str(tree)])
    assert {path: path.read_text() for path in before} == before


@pytest.mark.parametrize(
    "address", ["", "ada/lab", "https://example.com/a/b", "https://github.com/a"]
)
def test_an_address_that_colab_cannot_open_is_refused(address):
    with pytest.raises(ValueError, match="https://github.com/OWNER/NAME"):
        slug(address)
