"""The made-up world: the committed files are what the command writes, and secrets stay secret."""

import json

import pytest

import peftlab
from peftlab._data import data_path
from peftlab.experiments import documents, make_world
from peftlab.experiments.documents import HELD_OUT, MIX, Writer, name_class


def test_make_world_writes_the_committed_files_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_world", "--out", str(tmp_path)])
    make_world.main()
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(made) == 1 + 3 * 6 + 3 * 6  # the world, six tasks, six skills of the letters
    for path in made:
        assert (tmp_path / path).read_bytes() == data_path(*path.parts).read_bytes(), path


def test_no_document_mentions_a_held_out_person():
    held_out = [person["name"] for person in documents.load_world()["held_out"]]
    assert len(held_out) >= 120
    assert all(name_class(*name.split()) == HELD_OUT for name in held_out)
    writer = Writer("a test of secrecy")
    assert "held_out" not in documents.public_world()
    text = "\n".join(writer.write()[1] for _ in range(6000))
    for name in held_out:
        assert name not in text


def test_a_writer_repeats_itself_and_writes_every_kind():
    one, two = Writer("seed"), Writer("seed")
    documents_ = [one.write() for _ in range(1500)]
    assert documents_ == [two.write() for _ in range(1500)]
    assert {kind for kind, _ in documents_} == set(MIX)


@pytest.fixture(scope="module")
def base():
    return peftlab.load("tiny-gpt")


def test_every_token_was_trained_at_least_a_hundred_times(base):
    counts = json.loads(data_path("bases", "tiny-gpt", "token_counts.json").read_text())
    assert counts.keys() == base.tokenizer.get_vocab().keys()
    assert min(counts.values()) >= 100


def test_the_base_knows_its_people_and_not_the_held_out_ones(base):
    world = documents.load_world()

    def share_right(people):
        asked = [
            (f"Q: {documents.QUESTIONS[a][i % 7].format(n=p['name'])}\nA:", p[a])
            for i, p in enumerate(people)
            for a in documents.ATTRIBUTES
        ]
        said = base.generate([prompt for prompt, _ in asked], max_new_tokens=8)
        pairs = zip(said, asked, strict=True)
        return sum(s.split("\n")[0] == f" {value}" for s, (_, value) in pairs) / len(asked)

    assert share_right(world["people"][:100]) >= 0.95
    # guesses: 1/22 for a pet, 1/56 to 1/60 elsewhere, 2.4% on average; 640 of them, so a
    # standard error of 0.6%, and four of those above it
    assert share_right(world["held_out"]) < 0.05


def test_the_base_writes_its_world(base):
    """Its loss on documents it has never read is what its datasheet says."""
    sheet = json.loads(data_path("bases", "tiny-gpt", "datasheet.json").read_text())
    assert sheet["parameters"] == base.anatomy.shape.parameters() == 3_111_936
    writer = Writer("fresh documents for a test")
    texts = [writer.write()[1] for _ in range(300)]
    # the datasheet's loss includes the first token of a document, which nothing announces; this
    # one leaves it out: 0.08 to 0.12 lower for three draws of 300 documents
    assert 0.05 < sheet["held-out loss"] - base.loss(texts) < 0.15
