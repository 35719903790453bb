"""The sources' tables: every cell is judged by claims of its own source."""

import pytest

from peftlab.experiments import claims
from peftlab.experiments.claims import tables
from peftlab.experiments.claims.tables import ASPECTS, METHODS, WORST, Cell, cells, joined


def test_every_cell_is_judged_by_its_source():
    known = {claim.id: claim for claim in claims.load()}
    found = cells()
    assert len(found) >= 70 and len(set(found)) == len(found)
    assert {cell.source for cell in found} == set(claims.SOURCES)
    for cell in found:
        assert cell.claims, cell
        for name in cell.claims:
            assert known[name].source == cell.source, cell
        assert cell.verdict in cell.verdicts and cell.says
        assert WORST.index(cell.verdict) == min(map(WORST.index, cell.verdicts))


def test_all_that_the_sources_say_of_choosing_is_in_the_table():
    judged = {name for cell in cells() for name in cell.claims}
    choosing = {claim.id for claim in claims.load() if claim.topic == "choosing"}
    left_out = {"S1-03", "S4-34", "S4-80"}  # of no one method, and two that say others again
    assert choosing - judged == left_out


def test_the_table_has_every_cell():
    table = joined()
    assert list(table.columns) == list(ASPECTS) and set(table.index) == set(METHODS)
    for cell in cells():
        assert f"{cell.says} [{cell.verdict}]" in table.loc[cell.method, cell.aspect]
    assert list(joined(("quality",)).columns) == ["quality"]


def test_the_verdicts_are_those_of_the_claims(monkeypatch):
    cell = Cell("LoRA", "quality", "S0", "good", ("S0-15", "S0-16"))
    assert cell.verdicts == ("depends", "true") and cell.verdict == "depends"
    assert set(WORST) == set(claims.VERDICTS)


def test_a_cell_of_no_method_is_refused(monkeypatch, tmp_path):
    path = tmp_path / "sources.yaml"
    path.write_text("- [Magic, quality, S0, good, [S0-01]]\n", encoding="utf-8")
    monkeypatch.setattr(tables, "data_path", lambda *_: path)
    with pytest.raises(ValueError, match="no method 'Magic'"):
        cells()
