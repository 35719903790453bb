"""What lesson 13 says of the contests, its drawings, its bet, and its panel at every choice."""

import math
from html import escape

import numpy as np
import pandas as pd
import pytest

from peftlab import figures, panels
from peftlab.bases.data import data_path
from peftlab.bench import results
from peftlab.exercises import lesson_13 as lesson
from peftlab.figures.sheet import alt_text, overlaps, pale
from peftlab.figures.showdown import front, means
from peftlab.memory.adviser.evidence import LEAST_DEV
from peftlab.panels.showdown import COSTS, SHOWN, ShowdownView

SIX = ["LoRA", "DoRA", "(IA)³", "BitFit", "Half pruned + LoRA", "Prompt tuning"]
REAL = ("wnut17", "sst2-minilm", "pharmacy")


@pytest.fixture(scope="module")
def facts():
    return results.read("facts")


@pytest.fixture(scope="module")
def cipher():
    return results.read("permute")


@pytest.fixture(scope="module")
def sort():
    return results.read("sort")


# --- what the text says ------------------------------------------------------------------------


def test_the_rates(facts):
    rates = facts.settled.lr[SIX]
    assert rates.max() / rates.min() == pytest.approx(100)
    tried = facts.tried.groupby("label").lr.nunique()
    assert len(tried) == 13 and (tried > 3).sum() == 3
    at = facts.tried.groupby(["label", "lr"]).new_facts.mean()
    assert round(at["DoRA", 0.01], 2) == 0.99 and round(at["LoRA", 0.01], 2) == 0.09
    assert at["DoRA", 0.003] > 0.99 and at["LoRA", 0.003] > 0.99
    assert len(facts.tried) > len(facts.runs)


def test_the_two_differences(facts, cipher):
    one = facts.difference("LoRA", "(IA)³")
    other = cipher.difference("LayerNorm tuning", "Prefix tuning (P-tuning v2)")
    assert other["mean"] > one["mean"] > 0
    assert one.low > 0 and other.low < 0 < other.high
    scored = cipher.runs.pivot(index="seed", columns="label", values="exact")
    apart = scored["LayerNorm tuning"] - scored["Prefix tuning (P-tuning v2)"]
    assert (apart > 0).sum() == 4 and apart.min() < -0.5


def test_costs(facts):
    stored, trained = (facts.runs.groupby("label")[c].first() for c in ("stored", "trained"))
    assert round(trained["P-tuning"] / stored["P-tuning"]) == 136
    assert 550 < stored["Full fine-tuning"] / stored["LayerNorm tuning"] < 650
    assert stored["LoRA"] == stored["QLoRA"] == 165_888 and stored["Prompt tuning"] == 3_840
    peaks = facts.peaks(labels=["Full fine-tuning", "LayerNorm tuning"])
    assert round(peaks["Full fine-tuning"] / peaks["LayerNorm tuning"]) == 2


def test_known_facts_turn_the_order_round(facts):
    known = facts.comparisons.set_index("label").index
    kept = facts.runs.groupby("label").known_facts.mean()[known]
    assert round(kept["(IA)³"], 2) == 0.02 and round(kept["Half pruned + LoRA"], 2) == 0.03
    assert kept["LoRA"] > 0.5 > kept["Full fine-tuning"] > 0.4


def test_three_tasks_have_three_winners(facts, cipher, sort):
    winners = {}
    for result in (facts, cipher, sort):
        table = means(result)
        winners[result.facts["options"].get("skill", "facts")] = {
            budget: table.score[table.cost <= budget].idxmax() for budget in (5_000, 7_000, 166_000)
        }
    assert {won[5_000] for won in winners.values()} == {"LayerNorm tuning"}
    assert winners["permute"][7_000] == winners["facts"][7_000] == "(IA)³"
    assert winners["facts"][166_000] in ("LoRA", "QLoRA")
    score = {
        r.facts["options"].get("skill", "facts"): means(r).score for r in (facts, cipher, sort)
    }
    assert score["sort"]["LayerNorm tuning"] == 1 == score["facts"]["LoRA"]
    assert 0.5 < score["permute"]["LayerNorm tuning"] < 0.6
    assert 0.2 < score["facts"]["LayerNorm tuning"] < 0.3 and score["permute"]["(IA)³"] > 0.98
    steps = [result.facts["steps"] for result in (sort, cipher, facts)]
    assert steps == [60, 400, 500]


KNOBS = {
    "facts": {str(4 * n): f"facts-{n}" for n in (2, 10, 50)},
    "skills": {name: f"letters-{name}" for name in ("descend", "permute", "double_histogram")},
}


def test_one_knob_alone():
    few, many = (results.read(f"facts-{n}") for n in (2, 50))
    prefix, one = "Prefix tuning (P-tuning v2)", "LoRA, rank 1"
    assert few.difference(prefix, "LoRA").verdict == "not told apart"
    assert many.difference(prefix, "LoRA").verdict == "worse"
    scored, stored = means(many).score, many.runs.groupby("label").stored.first()
    assert round(8 * scored[prefix]) == 1 and round(scored[one], 2) == 0.96
    assert stored[one] < stored[prefix] / 2
    cipher, count = (results.read(f"letters-{name}") for name in ("permute", "double_histogram"))
    learned = (cipher.runs.pivot(index="seed", columns="label", values="exact") > 0.8).sum()
    assert learned["(IA)³"] == 5 and learned[prefix] == 1
    scored = means(count).score
    assert [round(scored[each], 2) for each in (prefix, "(IA)³")] == [0.36, 0.19]
    apart = count.difference(prefix, "(IA)³")
    assert [round(apart.low, 2), round(apart.high, 2)] == [-0.08, 0.42]
    above = ["Full fine-tuning", "LoRA", one]
    assert [round(scored[each], 2) for each in above] == [0.70, 0.68, 0.59]
    words = {count.difference(a, b).verdict for a in above for b in above if a != b}
    assert words == {"not told apart"}
    for names in KNOBS.values():  # nothing else is turned
        told = [results.read(name).facts for name in names.values()]
        for field in ("steps", "batch size", "base", "device", "precision", "seeds"):
            assert all(facts[field] == told[0][field] for facts in told)


def test_a_knob_is_drawn_with_every_run():
    knobs = {
        knob: {place: results.read(name) for place, name in names.items()}
        for knob, names in KNOBS.items()
    }
    fig = figures.turned(knobs, "title")
    lines, seeds = fig.data[::2], fig.data[1::2]
    assert len(lines) == 2 * 6
    there = [result for contests in knobs.values() for result in contests.values()]
    assert sum(len(trace.y) for trace in seeds) == sum(len(result.runs) for result in there)
    line = next(trace for trace in lines if trace.name == "LoRA, rank 1")
    wanted = [means(result).score["LoRA, rank 1"] for result in knobs["facts"].values()]
    assert list(line.y) == pytest.approx(wanted)


def test_prompts_jump_on_sort_and_nobody_else_does(sort):
    runs = sort.runs.groupby("label").exact
    spread = runs.max() - runs.min()
    assert set(spread[spread > 0.1].index) == {"Prompt tuning", "P-tuning"}
    prompt = sort.tried[sort.tried.label == "Prompt tuning"].set_index(["lr", "seed"]).exact
    assert list(prompt[0.3]) == [0.89, 0.8] and list(prompt[0.1]) == [0.67, 0.94]
    assert (sort.runs[sort.runs.label == "Prompt tuning"].exact == 0).sum() == 2


def test_the_best_are_at_the_ceiling_on_all_three_tasks(facts, cipher, sort):
    for result in (facts, cipher, sort):
        rows = result.comparisons.set_index("label")
        able = ["LoRA", "DoRA", "QLoRA", "Houlsby adapter", "Full fine-tuning"]
        assert (rows["mean"][able] > 0.95).all()
        assert all(set(able).isdisjoint(others) for others in rows.better_than[able])


def test_real_data_hold_the_order():
    real = {name: results.read(name) for name in REAL}
    full, kin = "Full fine-tuning", ["LoRA", "DoRA", "QLoRA", "Half pruned + LoRA"]
    for result in real.values():
        assert all(all(inside.values()) for inside in result.settled.inside)
        assert result.facts["seeds"] == [0, 1, 2, 3, 4]
        assert {result.difference(each, full).verdict for each in kin} == {"not told apart"}
        soft = [result.difference(each, full).verdict for each in ("Prompt tuning", "P-tuning")]
        assert soft == ["worse", "worse"]
    adapter = [real[name].difference("Houlsby adapter", full) for name in REAL]
    assert [row.verdict for row in adapter] == ["worse", "not told apart", "not told apart"]
    assert round(100 * adapter[0]["mean"]) == -3
    reviews = real["sst2-minilm"]
    for each in ("Prompt tuning", "P-tuning"):
        assert reviews.difference(each, "Head alone").verdict == "not told apart"
    for each in [*kin, "Houlsby adapter"]:
        assert 0.5 < -100 * reviews.difference(each, full)["mean"] < 2.5  # one to two points
    for each in ("Prefix tuning, MLP", "Prefix tuning (P-tuning v2)"):
        assert real["wnut17"].difference(each, full).verdict == "not told apart"
        assert 45 < -100 * real["pharmacy"].difference(each, full)["mean"] < 55
    pharmacy = real["pharmacy"].runs.groupby("label")
    lost, learned = pharmacy.plain_loss.mean(), pharmacy[real["pharmacy"].main].mean()
    prefix = "Prefix tuning (P-tuning v2)"
    assert round(lost[prefix] - lost["LoRA"], 1) == 2.8
    assert 0.45 < learned[prefix] / learned["LoRA"] < 0.55


def test_reviews_that_a_decoder_writes_hold_the_order_too():
    result, full = results.read("sst2-smollm2"), "Full fine-tuning"
    words = {
        each: result.difference(each, full) for each in result.facts["entries"] if each != full
    }
    for each in ("LoRA", "DoRA", "QLoRA", "Houlsby adapter"):
        assert words[each].verdict == "not told apart"
    pruned, prompt = words["Half pruned + LoRA"], words["Prompt tuning"]
    assert {pruned.verdict, prompt.verdict} == {"worse"}
    assert round(-100 * pruned["mean"]) == 5 and round(-100 * prompt["mean"]) == 2


def test_a_small_dev_cannot_choose_a_rate():
    result, full = results.read("e2e"), "Full fine-tuning"
    assert result.facts["dev examples"] < LEAST_DEV <= results.read("sort").facts["dev examples"]
    ahead = [r for r in result.comparisons.itertuples() if full in r.better_than]
    assert len(ahead) == 4 and {"Houlsby adapter", "(IA)³"} < {row.label for row in ahead}
    tried = result.search(full).groupby("rate")[result.main].mean()
    assert max(tried.index) / min(tried.index) == pytest.approx(100)
    assert tried.max() - tried.min() < 0.035
    assert (result.rate("LoRA"), result.rate("DoRA")) == (0.01, 0.0003)
    for label, least, most in (("LoRA", 0.015, 0.025), ("DoRA", 0, 0.01)):  # points it was ahead by
        first, second, *_ = sorted(result.search(label).groupby("rate")[result.main].mean())[::-1]
        assert least < first - second < most


def test_few_examples_tell_nobody_apart():
    full = "Full fine-tuning"
    counts = ("16", "64", "256", "all")
    sizes = {n: results.read(f"data-sst2-minilm-{n}", kind="study") for n in counts}
    for n, result in sizes.items():
        assert result.facts["seeds"] == [0, 1, 2, 3, 4]
        others = [each for each in result.facts["entries"] if each != full]
        worse = {each for each in others if result.difference(each, full).verdict == "worse"}
        most = {"Prompt tuning", "Prefix tuning (P-tuning v2)", "Head alone"}
        assert worse == (most if n == "all" else set())
        ended = [each for each, inside in result.settled.inside.items() if not all(inside.values())]
        assert ended == (["LoRA"] if n == "16" else [])
    won = {n: dict(r.comparisons[["label", "better_than"]].values) for n, r in sizes.items()}
    assert not any(won["16"].values()) and not any(won["256"].values())
    assert {k: v for k, v in won["64"].items() if v} == {"LoRA": ["Head alone"]}
    few = sizes["16"].runs.groupby("label")[sizes["16"].main]  # the seed moves more than the method
    assert (few.max() - few.min()).min() > few.mean().max() - few.mean().min()
    figure = figures.turned({"examples": sizes}, "title", lowest=0.5)
    lora = next(trace for trace in figure.data if trace.name == "LoRA")
    assert len(lora.y) == 3  # the search with 16 examples did not end inside
    assert figure.layout.yaxis.range[0] < 0.5 < min(lora.y)


def test_differences_are_drawn_as_they_are_recorded():
    real = {name: results.read(name) for name in REAL}
    figure = figures.apart_from(real, "Full fine-tuning", "title")
    found = 0
    for trace in figure.data:
        if trace.x[0] is None:  # the legend's
            continue
        result = list(real.values())[int((trace.xaxis or "x").removeprefix("x") or 1) - 1]
        for label, x, low, up in zip(
            trace.y, trace.x, trace.error_x.arrayminus, trace.error_x.array, strict=True
        ):
            row = result.difference(label, "Full fine-tuning")
            assert x == pytest.approx(100 * row["mean"]) and trace.name == row.verdict
            assert [x - low, x + up] == pytest.approx([100 * row.low, 100 * row.high])
            found += 1
    assert found == sum(len(result.facts["entries"]) - 1 for result in real.values())


def test_the_peak_of_one_contest_is_not_shown_for_another():
    panel = panels.showdown(
        "facts", cost="peak", peaks=dict.fromkeys(results.read("facts").facts["entries"], 7)
    )
    panel.choices["name"].value = "sort"  # the same base, batch and methods
    assert panel.view.cost == "peak"
    panel.choices["name"].value = "pharmacy"
    assert panel.view.cost == "stored" and panel.view.peaks is None
    assert "peak" not in dict(panel.choices["cost"].options).values()
    panel.close()


# --- drawings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dark", [False, True])
def test_the_drawings_can_be_read(facts, cipher, dark):
    pairs = {
        "One": (facts, "LoRA", "(IA)³"),
        "Two": (cipher, "LayerNorm tuning", "Prefix tuning (P-tuning v2)"),
    }
    own = {"Full fine-tuning": 16 * 10**9, "LoRA": 42 * 10**6, "Prompt tuning": 160_000}
    drawn = (
        figures.contest_course(facts, dark),
        figures.rate_search(facts, SIX, "title", dark),
        figures.paired_seeds(pairs, "title", dark),
        figures.domination(facts, "(IA)³", "title", dark=dark),
        figures.tenants("a base", 16 * 10**9, own, (1, 10, 50), dark),
    )
    for figure in drawn:
        assert not overlaps(figure) and not pale(figure)
        assert len(alt_text(figure)) > 60


def test_the_search_is_drawn_as_it_was(facts):
    figure = figures.rate_search(facts, SIX, "title")
    told = [note.text for note in figure.layout.annotations]
    for label in SIX:
        mine = facts.tried[facts.tried.label == label].groupby("lr").new_facts.mean()
        for rate, score in mine.items():
            best = rate == facts.settled.lr[label]
            assert (f"<b>{score:.0%}</b>" if best else f"{score:.0%}") in told
        assert f"{label} tried" in alt_text(figure)


def test_areas_of_tenants_are_to_one_scale():
    own = {"Full fine-tuning": 9 * 10**9, "LoRA": 10**9}
    figure = figures.tenants("a base", 9 * 10**9, own, (1, 4))
    boxes = [s for s in figure.layout.shapes if s.type == "rect"][:-1]  # the last is the key
    sides = sorted(round((s.x1 - s.x0) ** 2) for s in boxes)
    unit = sides[0]
    wanted = sorted([9, 9, 1, 36, 9, 4])  # full once, base and LoRA, full four times, base, four
    assert [round(side / unit) for side in sides] == wanted
    assert "4 with LoRA: 13.0 GB" in alt_text(figure) and "4 with Full" in alt_text(figure)


def test_the_front_is_what_nobody_beats():
    points = {
        "a": (5, 0.5), "b": (5, 0.4), "c": (7, 0.5), "d": (2, 0.1), "e": (9, 0.9), "f": (2, 0.1)
    }  # fmt: skip
    table = pd.DataFrame(points, index=["cost", "score"]).T
    assert front(table) == ["d", "f", "a", "e"]
    assert set(front(table)) == set(lesson.not_dominated_solution(points))


# --- the bet -----------------------------------------------------------------------------------


def test_a_bet_is_taken_or_refused():
    assert lesson.bet().status == lesson.bet(...).status == "open"
    assert lesson.bet(list(lesson.RUNNERS)).passed
    for given, said in (
        (["x"], "'x' does not run"),
        ("LoRA", "a list of names"),
        ([1], "a list of names"),
        (["LoRA", "LoRA"], "LoRA stands twice"),
        (["LoRA"], "no place for Prompt tuning"),
    ):
        verdict = lesson.bet(given)
        assert verdict.status == "wrong" and said in verdict.message


def test_a_bet_is_settled_by_what_is_told_apart(facts):
    order = list(lesson.RUNNERS)[::-1]
    told = 0
    better = facts.comparisons.set_index("label").better_than
    for first in order:
        told += len(set(better[first]) & set(order))
    good, bad = lesson.settle(order, facts), lesson.settle(order[::-1], facts)
    assert good.passed and f"{told} of {told} pairs" in good.message
    assert f"{15 - told} pairs nobody" in good.message
    assert bad.status == "wrong" and f"0 of {told} pairs" in bad.message
    swapped = order[:]
    swapped[2], swapped[3] = swapped[3], swapped[2]  # LoRA and (IA)³
    one = lesson.settle(swapped, facts)
    assert f"{told - 1} of {told}" in one.message
    assert f"You had {swapped[2]} before {swapped[3]}" in one.message
    assert lesson.settle(..., facts).status == "open"
    assert lesson.settle(["LoRA"], facts).status == "wrong"


# --- the panel ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", results.names())
def test_every_choice_of_the_panel(name):
    result = results.read(name)
    peaks = dict.fromkeys(result.facts["entries"], 7)
    choices = [(score, "stored") for score in result.scores[1:]]
    for score, cost in (*choices, *((result.main, cost) for cost in (*COSTS, "peak"))):
        view = ShowdownView(name, score, cost, "LoRA", peaks)
        figure = view.figure()
        labels = [t.name for t in figure.data if t.customdata is not None and t.showlegend is None]
        assert sorted(labels) == sorted(result.facts["entries"])
        points = sum(len(t.y) for t in figure.data if t.showlegend is False and t.customdata)
        assert points == len(result.runs)  # every seed
        assert view.front and all(label in labels for label in view.front)
    for opened in result.facts["entries"]:
        view = ShowdownView(name, result.main, "stored", opened)
        curves = [t for t in view.figure().data if t.xaxis == "x3"]
        (search,) = [t for t in view.figure().data if t.xaxis == "x2"]
        assert len(curves) == 5
        rates = set(search.x)
        assert min(rates) > 0 and view.result.rate(opened) in rates  # a head alone has the head's
        tried = result.tried[result.tried.label == opened]
        for rate in rates:  # each with both tuning seeds, and the score that was recorded
            drawn = sorted(y for x, y in zip(search.x, search.y, strict=True) if x == rate)
            column = "lr" if result.facts["entries"][opened]["methods"] else "head_lr"
            known = tried[tried[column] == rate][result.main]
            assert len(drawn) == 2 and set(drawn) <= set(known)
        for curve in curves:
            assert 0 < curve.x[0] < curve.x[-1] < result.facts["steps"]
            assert np.isfinite(np.array(curve.y)).all()
        first = result.runs[(result.runs.label == opened) & (result.runs.seed == 0)].iloc[0]
        if (data_path("tasks", result.facts["task"])).is_dir():
            assert view.html().count("<tr>") == SHOWN + 1
            assert escape(first.outputs[0].strip()) in view.html()
        else:
            assert "do not ship" in view.html() and "<tr>" not in view.html()


def test_a_click_opens_a_point_and_another_contest_has_its_own_scores():
    panel = panels.showdown("facts")
    before = panel.plot.version
    panel.plot._answer(None, {"clicked": "(IA)³"}, [])
    assert panel.view.opened == "(IA)³" == panel.choices["opened"].value
    assert panel.plot.version == before + 1 and "<b>(IA)³</b>" in panel.answers.value
    panel.plot._answer(None, {"clicked": "nobody"}, [])
    assert panel.view.opened == "(IA)³"
    panel.choices["score"].value = "known_facts"
    panel.choices["name"].value = "permute"
    assert panel.view == ShowdownView("permute", "exact", "stored", "(IA)³")
    assert dict(panel.choices["score"].options) == {"exact": "exact", "letters": "letters"}
    assert "Showdown: permute" in panel.describe()
    panel.close()


def test_what_the_panel_does_not_have():
    for given, said in (
        (dict(name="chess"), "no contest 'chess' is recorded"),
        (dict(cost="peak"), "cost='peak': allowed is stored, trained, file_bytes"),
        (dict(opened="nobody"), "opened='nobody': allowed is"),
        (dict(score="beauty"), "score='beauty': allowed is new_facts"),
    ):
        choice = dict(name="facts", score="new_facts", cost="stored", opened="LoRA") | given
        with pytest.raises(ValueError, match=said):
            ShowdownView(**choice)


def test_a_budget_buys_no_less_when_it_grows(facts, cipher):
    figure = figures.best_under({"facts": facts, "cipher": cipher}, "title")
    for line, result in zip(figure.data, (facts, cipher), strict=True):
        assert list(line.x) == sorted(line.x) and list(line.y) == sorted(line.y)
        table = means(result)
        for label, x, y in zip(line.customdata[:-1], line.x, line.y, strict=False):
            assert x == table.cost[label] and math.isclose(y, table.score[label])
            assert table.score[table.cost <= x].max() <= y + 0.005
