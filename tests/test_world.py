"""The made-up world: the committed files are what the command writes, and secrets stay secret."""

import json

import pytest
import tokenizers
import transformers

import peftlab
from peftlab.bases.data import data_path
from peftlab.experiments import documents, make_world
from peftlab.experiments.architectures import PLANS
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


FURTHER_BASES = sorted(set(PLANS) - {"tiny-gpt"})


@pytest.mark.parametrize("name", FURTHER_BASES)
def test_a_further_base_reads_the_ids_of_tiny_gpt_and_trained_them_all(name):
    first = tokenizers.Tokenizer.from_file(str(data_path("bases", "tiny-gpt", "tokenizer.json")))
    tokenizer = transformers.AutoTokenizer.from_pretrained(data_path("bases", name))
    vocabulary = tokenizer.get_vocab()
    assert first.get_vocab().items() <= vocabulary.items()
    text = "Q: Where does Gideon Waverly live?\nA: Vinely"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == first.encode(text).ids
    counts = json.loads(data_path("bases", name, "token_counts.json").read_text())
    assert counts.keys() == vocabulary.keys()
    special = {"<eos>", *tokenizer.all_special_tokens}
    assert min(n for token, n in counts.items() if token not in special) >= 100
    folder = data_path("bases", name)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8_000_000


@pytest.mark.parametrize("name", FURTHER_BASES)
def test_a_further_base_knows_what_its_datasheet_says(name):
    """Asked in its own way: it goes on, fills a mask or writes into a gap."""
    sheet = json.loads(data_path("bases", name, "datasheet.json").read_text())
    model = getattr(transformers, class_of(name)).from_pretrained(data_path("bases", name))
    tokenizer = transformers.AutoTokenizer.from_pretrained(data_path("bases", name))
    people = documents.load_world()["people"][:70]
    for attribute, share in sheet["known facts"].items():
        asked = [
            f"Q: {documents.QUESTIONS[attribute][i % 7].format(n=p['name'])}\nA:"
            for i, p in enumerate(people)
        ]
        said = PLANS[name].answers(model.eval(), tokenizer, asked)
        right = sum(s == f" {p[attribute]}" for s, p in zip(said, people, strict=True))
        # four standard errors of a share of 70, and a little for a share near 0 or 1
        assert abs(right / 70 - share) < 4 * (share * (1 - share) / 70) ** 0.5 + 0.03


def class_of(name: str) -> str:
    """The class that the base's configuration names."""
    config = json.loads(data_path("bases", name, "config.json").read_text())
    return config["architectures"][0]
