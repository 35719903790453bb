"""The tasks: what is disjoint from what, what a batch holds, and how an answer is scored."""

import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import peftlab
from peftlab.bases.data import data_path
from peftlab.experiments import tagged
from peftlab.experiments.documents import HELD_OUT, INVENTED, Writer, name_class
from peftlab.methods import heads
from peftlab.tasks import (
    IGNORED,
    NAMES,
    REAL,
    SPLITS,
    WITHOUT_HEAD,
    Example,
    facts,
    letters,
    load,
    read,
    reading,
    slots,
    tagging,
)

SKILLS = [f"letters/{skill}" for skill in letters.SKILLS]


def labels_of(names) -> list[str]:
    """The names, with one for each skill of the letters."""
    return [label for name in names for label in (SKILLS if name == "letters" else [name])]


def task_of(label):
    name, _, skill = label.partition("/")
    return load(name, skill=skill) if skill else load(name)


every_task = pytest.mark.parametrize("name", labels_of(NAMES))
every_task_of_the_world = pytest.mark.parametrize(
    "name", [name for name in labels_of(NAMES) if name not in REAL]
)
every_task_without_head = pytest.mark.parametrize("name", labels_of(WITHOUT_HEAD))
every_tagging = pytest.mark.parametrize("name", tagging.TASKS)


@pytest.fixture(scope="module")
def base():
    return peftlab.load("tiny-gpt")


@every_task
def test_no_prompt_is_in_two_splits(name):
    task = task_of(name)
    prompts = [{example.prompt for example in getattr(task, split)} for split in SPLITS]
    assert all(prompts)
    for i, one in enumerate(prompts):
        for other in prompts[i + 1 :]:
            assert not one & other


@every_task_of_the_world
def test_every_example_fits_and_uses_well_trained_tokens(name, base):
    counts = json.loads(data_path("bases", "tiny-gpt", "token_counts.json").read_text())
    task = task_of(name)
    for split in SPLITS:
        for example in getattr(task, split):
            if task.head is not None:  # the target is not text that a model reads
                example = Example(example.prompt, "")
            tokens = base.tokenizer.tokenize(example.prompt + example.target)
            assert len(tokens) < base.context - 100  # and leaves room for a hundred virtual tokens
            assert min(counts[token] for token in tokens) >= 100, example
            split_there = base.tokenizer.tokenize(example.prompt), example.target
            assert split_there[0] + base.tokenizer.tokenize(split_there[1]) == tokens, example


def test_the_facts_are_what_the_task_says():
    task = load("facts")
    world = json.loads(data_path("world", "world.json").read_text())
    new = {person["name"] for person in world["held_out"]}
    known = {person["name"] for person in world["people"]}
    assert not new & known

    def people(split, group, names):
        texts = [e.prompt for e in getattr(task, split) if e.group == group]
        found = {name for name in names for text in texts if name in text}
        return texts, found

    trained, taught = people("train", "new facts", new)
    assert len(taught) == 50 and len(trained) == 3 * 200
    for split in ("dev", "test"):
        for group in ("new facts", "new wordings"):
            texts, asked = people(split, group, new)
            assert asked == taught and len(texts) == 200
    apart = [people(split, "known facts", known)[1] for split in SPLITS]
    assert [len(names) for names in apart] == [100, 110, 110]
    assert not apart[0] & apart[1] and not apart[0] & apart[2] and not apart[1] & apart[2]


def test_new_wordings_are_in_no_training_example():
    task = load("facts")
    unused = [
        q for wordings in facts.QUESTIONS.values() for q in wordings[facts.TRAINED_WORDINGS :]
    ]
    shapes = [question.split("{n}") for question in unused]

    def has(prompt, shape):
        question = prompt.removesuffix("\n>>")
        return question.startswith(shape[0]) and question.endswith(shape[1])

    for example in task.train:
        assert not any(has(example.prompt, shape) for shape in shapes), example
    for example in task.test:
        if example.group == "new wordings":
            assert any(has(example.prompt, shape) for shape in shapes), example


def test_facts_are_graded_by_exact_match_and_by_form():
    task = load("facts")
    asked = [
        Example("a", " [home] Harwick", "new facts"),
        Example("b", " [job] cook", "new facts"),
        Example("c", " [pet] hen", "known facts"),
    ]
    scores = task.grade(asked, [" [home] Harwick", " [job] mason", " a hen"])
    assert scores == {"new_facts": 0.5, "known_facts": 0.0, "valid_format": pytest.approx(2 / 3)}


def test_slots_report_style_and_mapping_apart():
    task = load("slots")
    example = task.test[0]
    assert task.grade([example], [example.target]) == {"style": 1, "mapping": 1, "exact": 1}
    plain = example.target
    for old, new in slots.NEW_WORDS.items():
        plain = plain.replace(f" {new}", f" {old}")
    assert plain != example.target
    assert task.grade([example], [plain]) == {"style": 1, "mapping": 0, "exact": 0}


def test_sentiment_is_balanced_and_its_labels_are_single_tokens(base):
    task = load("sentiment")
    for split in SPLITS:
        labels = [example.target for example in getattr(task, split)]
        assert labels.count(" great") == labels.count(" awful")
    assert all(len(base.tokenizer.tokenize(label)) == 1 for label in (" great", " awful"))


@every_task_without_head
def test_a_batch_counts_the_target_and_its_end_only(name, base):
    task = task_of(name)
    examples = task.train[:5]
    batch = task.batch(examples, base.tokenizer)
    for row, example in enumerate(examples):
        labels = batch["labels"][row]
        kept = labels[labels != IGNORED].tolist()
        assert kept[-1] == base.tokenizer.eos_token_id
        assert base.tokenizer.decode(kept[:-1]) == example.target
        assert batch["input_ids"][row][labels != IGNORED].tolist() == kept
        real = batch["attention_mask"][row].sum().item()
        text = base.tokenizer.decode(batch["input_ids"][row][: real - 1])
        assert text == example.prompt + example.target
    with pytest.raises(ValueError, match="only 3 fit"):
        task.batch(examples, base.tokenizer, context=3)


@every_task_without_head
def test_the_untuned_base_is_near_chance_or_at_zero(name, base):
    scores = task_of(name).score(base)
    if name == "sentiment":
        # 240 balanced reviews: chance is 0.5 with a standard error of 0.032; four of them allowed
        assert abs(scores["accuracy"] - 0.5) < 0.13
    else:
        assert max(scores.values()) < 0.1


def test_an_unknown_task_is_refused_by_name():
    with pytest.raises(ValueError, match="sentiment, facts, slots, letters, entities"):
        load("chess")


# --- what a head reads ---------------------------------------------------------------------------


@dataclass
class Recites:
    """A stand-in for an encoder with a head: its logits are those that a test wants."""

    tokenizer: PreTrainedTokenizerFast
    logits: object  # from ids and mask to logits
    device: str = "cpu"
    context: int = 256
    kind: str = "encoder"

    def __call__(self, input_ids, attention_mask):
        return self.logits(input_ids, attention_mask)


def like_bert(texts) -> PreTrainedTokenizerFast:
    """Few byte-level pieces, so that most words have several, between [CLS] and [SEP]."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["[PAD]", "[CLS]", "[SEP]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")


def word_pieces(texts) -> PreTrainedTokenizerFast:
    """Word pieces without spaces, every punctuation mark apart, between [CLS] and [SEP]."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=500, special_tokens=["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")


@pytest.fixture(scope="module", params=["like bert", "word pieces", "tiny-gpt"])
def tokenizer(request, base):
    if request.param == "tiny-gpt":
        return base.tokenizer
    texts = [example.prompt for example in load("entities").train[:100]]
    return {"like bert": like_bert, "word pieces": word_pieces}[request.param](texts)


def people_in(text):
    """Full names in a text; '.' keeps the end of one sentence from the start of the next."""
    names = {*tagged.w.WOMEN, *tagged.w.MEN}, set(tagged.w.LAST_NAMES)
    pairs = re.findall(r"(?=\b(\w+) (\w+))", text)
    return {(first, last) for first, last in pairs if first in names[0] and last in names[1]}


@pytest.mark.parametrize("name", ["entities", "speech", "reading"])
def test_the_people_of_a_split_are_in_no_other_and_in_no_document(name):
    task = load(name)
    split_people = [
        {pair for example in getattr(task, split) for pair in people_in(example.prompt)}
        for split in SPLITS
    ]
    assert all(len(people) >= 100 for people in split_people)
    assert len(set.union(*split_people)) == sum(map(len, split_people))
    assert {name_class(*pair) for people in split_people for pair in people} == {INVENTED}
    sizes = {split: len(getattr(task, split)) for split in SPLITS}
    assert sizes == {"train": 256, "dev": 100, "test": 240}


@every_tagging
def test_every_word_has_a_tag_and_every_tag_is_taught(name):
    task = load(name)
    taught = set()
    for split in SPLITS:
        for example in getattr(task, split):
            words, tags = tagging.words(example.prompt), example.target.split()
            assert len(words) == len(tags)
            assert "".join(words) == "".join(example.prompt.split())
            taught |= set(tags) if split == "train" else set()
            assert set(tags) <= set(task.labels)
    assert taught == set(task.labels)
    assert isinstance(task.head, heads.Tagging) and task.head.labels == task.labels


@pytest.mark.parametrize("split", SPLITS)
def test_entities_are_what_the_sentences_say(split):
    """Found again by the wording around them, apart from the marks that made the gold."""
    towns = {town for towns in tagged.w.REGIONS.values() for town in towns}
    found = Counter()
    for example in getattr(load("entities"), split):
        words = tagging.words(example.prompt)
        for first, last, kind in tagging.spans(example.target.split()):
            text = " ".join(words[first : last + 1])
            before = " ".join(words[max(first - 3, 0) : first])
            after = " ".join(words[last + 1 : last + 4])
            found[kind] += 1
            if kind in ("SUBJECT", "FRIEND", "OWNER", "BUYER"):
                first_name_only = kind == "SUBJECT" and " " not in text
                assert first_name_only or name_class(*text.split()) == INVENTED, text
            if kind == "BUYER":
                assert after.startswith(("looked at the", "paid", "bought some"))
            elif kind == "OWNER":
                owns = before.endswith(("The owner is", "It belongs to"))
                assert owns or after == "is the owner"
            elif kind == "FRIEND":
                friends = before.endswith(("best friend is", "often visits", "to school with"))
                assert friends, (before, text)
            elif kind == "SITE":
                assert text in towns and before.endswith(("in", "In", "moved to"))
            elif kind == "HOME":
                assert text in towns and before.endswith(("in", "town is", "moved to"))
            elif kind == "SHOP":
                assert re.fullmatch(r"The \w+ \w+", text)
            elif kind == "REGION":
                assert text in tagged.w.REGIONS
            elif kind == "PET":
                assert text in (*tagged.w.PETS, *tagged.w.ANIMALS)
            elif kind == "JOB":
                assert text in tagged.w.JOBS and before.endswith((" a", " an"))
    assert found.keys() == set(tagging.ENTITIES)


# Words of the documents and of `tagged` that are two parts of speech, besides the acts.
TWO_WAYS = set("as has her home like long love needs open rain that to walk work".split())


def test_a_word_with_two_parts_of_speech_is_used_in_both_ways():
    uses = defaultdict(lambda: defaultdict(Counter))
    task = load("speech")
    for split in ("train", "test"):
        for example in getattr(task, split):
            tags = example.target.split()
            for word, tag in zip(tagging.words(example.prompt), tags, strict=True):
                uses[split][word.lower()][tag] += 1
    acts = {form for act in tagged.ACTS for form in (act, tagged.plural(act))}
    names = {name.lower() for name in (*tagged.w.WOMEN, *tagged.w.MEN, *tagged.w.LAST_NAMES)}
    ambiguous = {word for word, tags in uses["train"].items() if len(tags) > 1}
    assert TWO_WAYS | acts >= ambiguous - names
    assert ambiguous >= TWO_WAYS
    assert len(ambiguous & acts) > 0.9 * len(acts)
    for word in ambiguous & acts:
        assert uses["train"][word].keys() == {"NOUN", "VERB"}, word
    for word in TWO_WAYS:
        assert len(uses["test"][word]) == 2, word


@pytest.mark.parametrize(
    ("sentence", "gold"),
    [
        ("Everybody saw {her} paint the door", "PRON"),
        ("She saw {her} paint in the cave", "DET"),
        ("They {work} like a cook", "VERB"),
        ("never goes to {work} without", "NOUN"),
        ("as {happy} as", "ADJ"),
    ],
)
def test_the_tag_of_a_word_in_its_place(sentence, gold):
    """Each pattern is looked for in the data as its neighbours: one word before, one after."""
    before, word, after = re.search(r"(\w+) \{(\w+)\} (\w+)", sentence).groups()
    place = tagged.ACTS.keys() if after == "paint" else {after}
    task, tags = load("speech"), Counter()
    for example in (*task.train, *task.test):
        words, parts = tagging.words(example.prompt), example.target.split()
        for i in range(1, len(words) - 2):
            if words[i] == word and words[i - 1] == before and words[i + 1] in place:
                verb = words[i + 2] in ("the", "his")  # 'saw her paint the door'
                if word != "her" or verb == (gold == "PRON"):
                    tags[parts[i]] += 1
    assert tags.keys() == {gold} and tags.total() >= 3


def test_word_identity_is_not_enough():
    """The most frequent tag of each word leaves much to learn, in both tasks."""
    entities = load("entities").baseline()
    assert 0.3 < entities["f1"] < 0.6 and entities["accuracy"] < 0.9
    speech = load("speech").baseline()
    assert 0.8 < speech["accuracy"] < 0.92 and speech["ambiguous"] < 0.75


def test_the_baseline_gives_each_word_its_most_frequent_tag():
    train = [Example("the cook", "DET NOUN"), Example("the cook", "DET VERB")]
    train += [Example("cook Ada", "NOUN PROPN")]
    task = tagging.Speech(train, train, [Example("the cook cook Ben", "DET NOUN VERB PROPN")])
    assert task.baseline() == {"accuracy": 0.75, "ambiguous": 0.5}


def test_entities_are_graded_whole():
    task = load("entities")
    gold = [Example("Ada Bee lives in Ham", "B-SUBJECT I-SUBJECT O O B-HOME")]
    assert task.grade(gold, [gold[0].target]) == {"f1": 1, "accuracy": 1}
    half = task.grade(gold, ["B-SUBJECT O O O B-HOME"])  # one right, of two and of two
    assert half == {"f1": 0.5, "accuracy": 0.8}
    assert task.grade(gold, ["O O O O O"])["f1"] == 0
    more = task.grade(gold, ["B-SUBJECT I-SUBJECT O B-JOB B-HOME"])  # two right, of two and three
    assert more["f1"] == pytest.approx(4 / 5)
    assert tagging.spans("I-HOME I-HOME B-HOME O I-PET I-JOB".split()) == {
        (0, 1, "HOME"),
        (2, 2, "HOME"),
        (4, 4, "PET"),
        (5, 5, "JOB"),
    }
    with pytest.raises(ValueError, match="longer|shorter"):
        task.grade(gold, ["O O"])


@every_tagging
def test_tags_stand_at_the_first_token_of_each_word(name, tokenizer):
    task = load(name)
    examples = [example for example in task.test if "'" in example.prompt][:4] + task.test[:4]
    batch = task.batch(examples, tokenizer)
    assert batch["labels"].shape == batch["input_ids"].shape
    for row, example in enumerate(examples):
        length = int(batch["attention_mask"][row].sum())
        ids = batch["input_ids"][row].tolist()
        assert ids[:length] == tokenizer(example.prompt)["input_ids"]
        assert set(ids[length:]) <= {tokenizer.pad_token_id}
        at = (batch["labels"][row] != IGNORED).nonzero().flatten().tolist()
        words = tagging.words(example.prompt)
        assert [task.labels[i] for i in batch["labels"][row][at].tolist()] == (
            example.target.split()
        )
        for word, start, end in zip(words, at, [*at[1:], length], strict=True):
            text = tokenizer.decode(ids[start:end], skip_special_tokens=True)
            assert text.replace(" ", "").replace("##", "") == word
    with pytest.raises(ValueError, match="only 5 fit"):
        task.batch(examples, tokenizer, context=5)


@every_tagging
def test_the_most_probable_tag_is_what_is_graded(name, tokenizer):
    task = load(name)

    def gold(input_ids, attention_mask):
        """The gold of the batch that was just made; -100 becomes class 0."""
        labels = waiting.pop(0)
        assert labels.shape == input_ids.shape
        return torch.nn.functional.one_hot(labels.clamp(min=0), len(task.labels)).float()

    examples = task.test[:10]
    waiting = [task.batch(examples[i : i + 4], tokenizer)["labels"] for i in (0, 4, 8)]
    scores = task.score(Recites(tokenizer, gold), examples, batch_size=4)
    assert scores[task.main] == scores["accuracy"] == 1
    constant = Recites(tokenizer, lambda ids, mask: torch.zeros(*ids.shape, len(task.labels)))
    assert task.score(constant, examples)[task.main] < 0.4


@pytest.mark.parametrize("name", ["entities", "speech", "reading"])
def test_tasks_with_a_head_go_on_encoders_only(name, base):
    task = load(name)
    for kind in ("decoder", "encoder-decoder"):
        with pytest.raises(ValueError, match="goes on encoders"):
            task.batch(task.train[:2], base.tokenizer, kind=kind)
    with pytest.raises(ValueError, match="at least one example"):
        task.batch([], base.tokenizer)


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_the_answer_stands_in_the_context_of_the_person_asked_about(split):
    for example in getattr(load("reading"), split):
        *lives, question = example.prompt.split("\n")
        assert len(lives) in (2, 3) and example.context == "\n".join(lives)
        assert example.prompt[example.start :].startswith(example.target)
        assert example.start + len(example.target) < len(example.context)
        ((first, last),) = people_in(question)
        line = example.context.count("\n", 0, example.start)
        asked = [i for i, life in enumerate(lives) if f"{first} {last}" in life]
        assert asked == [line]
        (attribute,) = {
            attribute
            for attribute, wordings in facts.QUESTIONS.items()
            if question in {wording.format(n=f"{first} {last}") for wording in wordings}
        }
        values = {
            "home": tagged.Writer(0).towns,
            "job": tagged.w.JOBS,
            "likes": tagged.w.LIKES,
            "pet": tagged.w.PETS,
        }
        assert example.target in values[attribute]


def test_half_of_the_questions_outside_training_have_new_wordings():
    task = load("reading")

    def wording(example):
        question = example.prompt.split("\n")[-1]
        ((first, last),) = people_in(question)
        return question.replace(f"{first} {last}", "{n}")

    trained = {wording(example) for example in task.train}
    assert {example.group for example in task.train} == {reading.TRAINED}
    for split in (task.dev, task.test):
        for example in split:
            assert (wording(example) in trained) == (example.group == reading.TRAINED)
        assert sum(example.group == reading.NEW for example in split) == len(split) / 2


def test_span_labels_cover_the_answer_and_nothing_else(tokenizer):
    task = load("reading")
    examples = task.test[:40]
    batch = task.batch(examples, tokenizer)
    assert batch["labels"].shape == (40, 2)
    for example, ids, (start, end) in zip(
        examples, batch["input_ids"], batch["labels"].tolist(), strict=True
    ):
        text = tokenizer.decode(ids[start : end + 1])
        assert text.replace(" ", "").replace("##", "") == example.target
    again = Recites(tokenizer, lambda ids, mask: at(batch["labels"], ids.shape[1]))
    assert task.score(again, examples) == {"exact": 1, "f1": 1, "new_wordings": 1}


def at(labels, length):
    """Logits that are highest at the start and at the end that the labels name."""
    return torch.nn.functional.one_hot(labels, length).float().transpose(1, 2)


def test_a_span_is_in_the_context_in_order_and_not_long():
    text = "Ada has a cat. Ben has an owl and a dog and a hen and a fox.\nWho has a cat?"
    example = reading.Question(text, "cat", "", 10)
    # a token for each word, between two special ones
    offsets = [(0, 0), *(word.span() for word in tagging.WORD.finditer(text)), (0, 0)]
    place = {text[start:end]: i for i, (start, end) in reversed(list(enumerate(offsets)))}

    def best(**scores):
        logits = torch.zeros(len(offsets), 2)
        for column, name in enumerate(("start", "end")):
            for word, value in scores[name].items():
                logits[place[word], column] = value
        return reading.best_span(example, offsets, logits)

    assert best(start={"cat": 3}, end={"cat": 3}) == "cat"
    assert best(start={"an": 3}, end={"owl": 3}) == "an owl"
    # the question and the ends before the start are out of bounds
    assert best(start={"?": 9, "owl": 3}, end={"?": 9, "owl": 3}) == "owl"
    assert best(start={"owl": 4, "Ada": 3}, end={"cat": 3, "owl": 1}) == "Ada has a cat"
    # nine tokens at most: 'fox' is too far from 'Ben'
    assert best(start={"Ben": 4, "hen": 1}, end={"fox": 4}) == "hen and a fox"


def test_reading_is_graded_by_exact_match_and_by_words():
    task = load("reading")
    examples = [
        reading.Question("x\ny", "Ada Bee", reading.TRAINED),
        reading.Question("x\ny", "owl", reading.NEW),
    ]
    scores = task.grade(examples, ["Ada", "owl"])
    # one word of two found, none too many: 2 · 1 · ½ / (1 + ½)
    assert scores == {"exact": 0.5, "f1": pytest.approx((2 / 3 + 1) / 2), "new_wordings": 1}
    assert task.grade(examples, ["dog", "dog"]) == {"exact": 0, "f1": 0, "new_wordings": 0}


# --- letters -------------------------------------------------------------------------------------


def rising(text):
    return all(text[i] < text[i + 1] for i in range(len(text) - 1))


@pytest.mark.parametrize("skill", letters.SKILLS)
def test_letters_follow_their_rule(skill):
    """The rules, written a second time."""
    task = load("letters", skill=skill)
    assert [len(getattr(task, split)) for split in SPLITS] == [512, 100, 200]
    plain, keyboard = "abcdefghijklmnopqrstuvwxyz", "qwertyuiopasdfghjklzxcvbnm"
    for split in SPLITS:
        for example in getattr(task, split):
            given = re.fullmatch(r"in: ([a-y](?: [a-y])*)\nout:", example.prompt)[1].split()
            said = re.fullmatch(r"(?: \w)+", example.target)[0].split()
            if skill == "double_histogram":
                assert len(said) == 2 * len(given)
                assert len(set(given)) <= 3 < len(given) <= 6
            else:
                assert len(said) == len(given)
                assert len(set(given)) == len(given) and 3 <= len(given) <= 6
            line, answer = "".join(given), "".join(said)
            if skill == "sort":
                assert set(answer) == set(line) and rising(answer)
            elif skill == "descend":
                assert set(answer) == set(line) and rising(answer[::-1])
            elif skill == "reverse":
                assert all(line[-1 - i] == letter for i, letter in enumerate(answer))
            elif skill == "upper":
                assert answer.isupper() and answer.lower() == line
            elif skill == "permute":
                assert answer == line.translate(str.maketrans(plain, keyboard))
            else:
                assert said[::2] == given
                assert all(
                    int(n) == line.count(a) for a, n in zip(said[::2], said[1::2], strict=True)
                )


@pytest.mark.parametrize("skill", letters.SKILLS)
def test_no_two_examples_have_the_same_letters(skill):
    task = load("letters", skill=skill)
    prompts = [e.prompt for split in SPLITS for e in getattr(task, split)]
    inputs = {tuple(sorted(p.split("\n")[0].split()[1:])) for p in prompts}
    assert len(inputs) == len(prompts)
    trained = {token for e in task.train for token in e.target.split()}
    assert {token for e in task.test for token in e.target.split()} <= trained


def test_no_document_has_the_form_of_the_letter_skills():
    writer = Writer("a test of form")
    for _ in range(5000):
        assert not re.search(r"\bin: [a-z]( [a-z])*\n|\bout:", writer.write()[1])


def test_letters_are_graded_whole_and_place_by_place():
    task = load("letters")
    examples = [Example("in: b a\nout:", " a b"), Example("in: d c\nout:", " c d")]
    assert task.grade(examples, [" a b", " c d"]) == {"exact": 1, "letters": 1}
    assert task.grade(examples, [" a c", " c d"]) == {"exact": 0.5, "letters": 0.75}
    # three places and two, of which one and two are right
    assert task.grade(examples, [" a c b", " c d"]) == {"exact": 0.5, "letters": 0.6}
    assert task.grade(examples, ["", ""]) == {"exact": 0, "letters": 0}


def test_letters_know_their_skill():
    assert load("letters").skill == "sort"
    assert load("letters", skill="upper").title == "Letter skills: upper"
    with pytest.raises(ValueError, match="sort, reverse, upper, descend, permute, double"):
        load("letters", skill="juggle")


# --- the grammar with marks ----------------------------------------------------------------------


def test_marks_come_off_and_leave_the_sentence_as_it_is():
    who = tagged.mark("Ada Jones", "PROPN", "SUBJECT")
    found = tagged.Tagged.of(f"{who}'s pet is {tagged.a(tagged.mark('owl', 'NOUN', 'PET'))}.")
    assert found.text == "Ada Jones' pet is an owl."
    assert found.parts == ("PROPN", "PROPN", "PART", "NOUN", "AUX", "DET", "NOUN", "PUNCT")
    assert found.entities == ("B-SUBJECT", "I-SUBJECT", "O", "O", "O", "O", "B-PET", "O")
    assert found.found == {"SUBJECT": 0, "PET": found.text.index("owl")}
    with pytest.raises(ValueError, match="'zebra'"):
        tagged.Tagged.of("The zebra is small.")


def test_the_marked_biographies_are_the_documents_biographies():
    """The same random numbers give the same text, with marks and without."""
    world = tagged.Writer("x")
    for person in world.people[:60]:
        plain, marked = Writer(person["name"]), tagged.TaggedWriter(person["name"])
        for _ in range(3):
            assert tagged.Tagged.of(marked.biography(person)).text == plain.biography(person)


def test_the_writer_of_tasks_names_nobody_held_out():
    writer = tagged.TaggedWriter("held out?")
    texts = [writer.entities().prompt for _ in range(200)]
    texts += [writer.reading(False).prompt for _ in range(200)]
    classes = {name_class(*pair) for text in texts for pair in people_in(text)}
    assert classes == {INVENTED} and HELD_OUT not in classes


# Files of others -------------------------------------------------------------------------------

LINE = '{"prompt": "a", "target": "b"}'


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "Expecting"),
        ("[1]", "no object"),
        ("7", "no object"),
        ('"text"', "no object"),
        ("null", "no object"),
        ('{"prompt": "a"}', "'target'"),
        ('{"prompt": "a", "target": "b", "answer": "c"}', "'answer'"),
        ('{"prompt": 3, "target": "b"}', "prompt=3: str is needed"),
        ('{"prompt": "a", "target": [1, 2]}', "target=.1, 2.: str is needed"),
        ('{"prompt": "a", "target": null}', "target=None: str is needed"),
        ('{"prompt": "a", "target": "b", "group": {}}', "group={}: str is needed"),
        ('{"prompt": "a", "target": true}', "target=True: str is needed"),
        ("[" * 100_000, "recursion"),
        (f"{LINE} {LINE}", "Extra data"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_a_line_that_is_no_example(line, words, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{LINE}\n\n{line}\n{LINE}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"mine.jsonl: line 3: .*{words}"):
        read(path)


@pytest.mark.parametrize(
    "value, words",
    [("1", "start='1': int is needed"), (0.5, "start=0.5: int"), (True, "start=True: int")],
)
@pytest.mark.usefixtures("untyped")
def test_a_field_of_a_kind_of_example(value, words, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "a", "target": "a", "start": value}))
    with pytest.raises(ValueError, match=f"line 1: {words}"):
        read(path, reading.Question)


def test_a_file_that_is_no_text_or_is_empty(tmp_path):
    path = tmp_path / "mine.jsonl"
    for content, words in (
        (b"\xff\xfe\x00", "can't decode"),
        (b"", "no examples"),
        (b"\n \n", "no examples"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"mine.jsonl.*{words}"):
            read(path)
    with pytest.raises(FileNotFoundError, match="none.jsonl"):
        read(tmp_path / "none.jsonl")


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\r"])
def test_only_a_new_line_ends_a_line(sign, tmp_path):
    path, text = tmp_path / "mine.jsonl", f"a{sign}b"
    whole = json.dumps({"prompt": text, "target": "c"}, ensure_ascii=False)
    path.write_text(f"\ufeff{whole}\r\n{LINE}\n", encoding="utf-8", newline="")
    assert [example.prompt for example in read(path)] == [text, "a"]


def test_a_split_without_examples():
    facts = peftlab.tasks.load("facts")
    base = peftlab.load("tiny-gpt")
    for split in ("train", "dev", "test"):
        splits = {name: getattr(facts, name)[:2] for name in ("train", "dev", "test")}
        task = type(facts)(**splits | {split: []})
        with pytest.raises(ValueError, match=f"the task facts has no examples in {split}"):
            task.split(split)
        with pytest.raises(ValueError, match=f"the task facts has no examples in {split}"):
            task.score(base, getattr(task, split))
    with pytest.raises(ValueError, match="the task facts has no examples in test"):
        task.score(base)
    with pytest.raises(ValueError, match="a list of examples is needed"):
        task.score(base, [])


def test_facts_of_few_new_people_ask_the_same_of_known_ones():
    whole = load("facts")
    for people in (1, 10, 50):
        few = load("facts", people=people)
        for split in ("train", "dev", "test"):
            asked = {group: [] for group in ("new facts", "new wordings", "known facts")}
            for example in few.split(split):
                asked[example.group].append(example)
            known = [e for e in whole.split(split) if e.group == "known facts"]
            assert asked["known facts"] == known
            new = asked["new facts"] + asked["new wordings"]
            assert len({facts.name_in(example) for example in new}) == people
            assert len(new) == people * (12 if split == "train" else 8)
            assert all(example in whole.split(split) for example in new)
    assert load("facts", people=50).train == whole.train
    for people in (0, 51, -1, True):
        with pytest.raises(ValueError, match="people=.*allowed is 1 to 50"):
            load("facts", people=people)


def test_a_batch_of_nothing_and_a_cloze_of_two_tokens_are_refused():
    task, bert = peftlab.tasks.load("sentiment"), peftlab.load("tiny-bert")
    with pytest.raises(ValueError, match="at least one example"):
        task.batch([], bert.tokenizer, kind="encoder")
    long = replace(task.train[0], target=" good good")
    with pytest.raises(ValueError, match="an encoder fills one token; ' good good' is not one"):
        task.batch([long], bert.tokenizer, kind="encoder")
