"""A results page has its table, and a picture where the table has ratios."""

from pathlib import Path

import pytest

from bench import report

RATIOS = [
    {"flags": "none", "threads": "1", "TPOT, ms": "2.00 / 1.00", "TPOT": "2.000 [1.900, 2.100], 12 pairs"},
    {"flags": "all", "threads": "2", "TPOT, ms": "1.00 / 1.00", "TPOT": "1.000 [0.950, 1.053], 12 pairs"},
]


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return tmp_path


def test_ratios_are_drawn_with_the_names_of_their_rows(results: Path) -> None:
    report.write("speed", "Speed", "What was asked.", RATIOS, {"machine": "x"})
    page, picture = (results / "speed.md").read_text(), (results / "speed.svg").read_text()
    assert "(speed.svg)" in page
    assert "| none | 1 | 2.00 / 1.00 | 2.000 [1.900, 2.100], 12 pairs |" in page
    assert all(said in picture for said in (">none, 1<", ">all, 2<", ">TPOT<"))
    assert ">TPOT, ms<" not in picture


def test_a_picture_is_the_same_whenever_it_is_drawn(results: Path) -> None:
    drawn = []
    for _ in range(2):
        report.write("speed", "Speed", "What was asked.", RATIOS, {})
        drawn.append((results / "speed.svg").read_bytes())
    assert drawn[0] == drawn[1]


def test_a_table_without_ratios_has_no_picture(results: Path) -> None:
    report.write("bytes", "Bytes", "What was asked.", [{"flags": "none", "bytes": 7}], {})
    assert ".svg" not in (results / "bytes.md").read_text()
    assert not list(results.glob("*.svg"))
