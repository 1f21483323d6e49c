"""What is handed on of an experiment: each export read back, and the page as a browser would see it."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import geometric_mean

import pandas as pd
import pytest

from splitlearn.lab.analysis.findings import Findings, analyse
from splitlearn.lab.records import Setup, Trial
from splitlearn.lab.report import exports
from tests.support.lab_trials import setup, trials

EVIL = "<script>alert('prompt')</script> & <img src=x onerror=alert(1)>"
WITHOUT = "without inference_mode, full"


@pytest.fixture(scope="module")
def findings() -> Findings:
    """A tenth faster with inference_mode in the full arm; one block bad; text that must be escaped everywhere."""
    asked = setup(prompts=(EVIL,), model=EVIL, environment={"processor": EVIL})
    made = trials(asked, {(WITHOUT, "tpot_s"): 1.10})
    bad = [replace(trial, block=12, bad=f"disturbed {EVIL}") for trial in made if trial.block == 0]
    return analyse(asked, made + bad, {"note": EVIL}, finished="12 pairs, as asked")


@pytest.fixture(scope="module")
def folder(findings: Findings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("exports") / "not there yet"
    written = exports.write_exports(findings, where)
    assert written == [where / name for name in EXPORTS]
    return where


EXPORTS = ("results.json", "flags.csv", "verdicts.csv", "pairs.csv", "trials.csv", "report.html", "report.md")


class Page(HTMLParser):
    """What is on a page: tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else self._inside

    def handle_endtag(self, tag: str) -> None:
        self._inside = "" if tag == self._inside else self._inside

    def handle_data(self, data: str) -> None:
        self.text += "" if self._inside else data


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_json_has_everything_and_its_trials_read_back(findings: Findings, folder: Path) -> None:
    read = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert Setup.from_json(read["setup"]) == findings.setup
    assert tuple(Trial.from_json(trial) for trial in read["trials"]) == findings.trials
    found = [row for row in read["verdicts"] if row["verdict"] == "faster"]
    assert [(row["flag"], row["kind"], row["metric"]) for row in found] == [("inference_mode", "full", "tpot_s")]
    assert read["finished"] == "12 pairs, as asked"
    assert read["notes"] == {"note": EVIL}


def test_the_csv_files_read_back_with_the_figures_of_the_json(folder: Path) -> None:
    verdicts, pairs, runs = (pd.read_csv(folder / name) for name in EXPORTS[2:5])
    read = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert list(verdicts["ratio"]) == [row["ratio"] for row in read["verdicts"]]
    chosen = pairs.query("flag == 'inference_mode' and kind == 'full' and metric == 'tpot_s'")
    row = verdicts.query("flag == 'inference_mode' and kind == 'full' and metric == 'tpot_s'").iloc[0]
    assert len(chosen) == row["pairs"] == 12
    assert geometric_mean(chosen["ratio"]) == pytest.approx(row["ratio"]), "the raw pairs give the ratio"
    assert len(runs) == len(read["trials"])
    assert runs["bad"].notna().sum() == len(read["setup"]["plan"]["arms"])


def test_the_page_loads_nothing_from_anywhere(page: Page) -> None:
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            assert name not in attributes, f"<{tag} {name}={attributes.get(name)}>"
        assert tag not in ("link", "iframe", "base", "object", "embed")


def test_the_page_has_plotly_once_and_draws_each_picture(folder: Path, page: Page) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert text.count("Plotly.newPlot(") == 10 + text[: text.index("</script>")].count("Plotly.newPlot(")
    assert 4e6 < len(text) < 6e6, "one plotly.js is 4 to 5 MB"
    assert sum(attributes.get("class") == "plotly-graph-div" for _, attributes in page.tags) == 10


def test_text_from_outside_is_text_on_the_page(page: Page) -> None:
    assert page.text.count(EVIL) >= 5, "title, heading, prompt, environment, notes, the reason of the bad block"
    assert not [attributes for tag, attributes in page.tags if tag == "img" or "onerror" in attributes]


def test_the_page_names_the_command_that_repeats_it(findings: Findings, page: Page) -> None:
    assert findings.setup.command in page.text


def test_the_page_shows_verdicts_with_their_pairs_and_the_blocks_that_do_not_count(page: Page) -> None:
    assert "faster" in page.text
    assert "n = 12 whole blocks" in page.text
    assert "disturbed" in page.text
    assert "15 to 25% sooner" in page.text


def test_tables_have_headers_with_a_scope(page: Page) -> None:
    heads = [attributes for tag, attributes in page.tags if tag == "th"]
    assert heads
    assert all(attributes.get("scope") in ("col", "row") for attributes in heads)
    assert sum(tag == "table" for tag, _ in page.tags) == 6


def test_a_failed_flag_is_a_failure_on_the_page_and_in_markdown() -> None:
    asked = setup()
    made = trials(
        asked, change=lambda arm, trial: replace(trial, token_ids=(1,) * 16) if arm.name == WITHOUT else trial
    )
    findings = analyse(asked, made, {})
    said = "FAILED: exact flag, tokens differ at token 1 of block 0"
    assert said in Page(exports.html(findings)).text
    assert said in exports.markdown(findings)


def test_markdown_keeps_its_tables_whole_whatever_the_text() -> None:
    asked = setup(model=EVIL)
    made = [trial for trial in trials(asked) if trial.arm != WITHOUT]
    text = exports.markdown(analyse(asked, made, {"failed": {WITHOUT: f"refused | by\nthe {EVIL}"}}))
    assert "refused \\| by the &lt;script>" in text
    assert "<script>" not in text and "<img" not in text
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 5
    for lines in tables:
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_an_experiment_that_has_only_begun_can_be_exported(tmp_path: Path) -> None:
    for count in (0, 1, 2):
        asked = setup()
        written = exports.write_exports(analyse(asked, trials(asked, blocks=count), {}), tmp_path)
        assert all(path.stat().st_size for path in written)
        assert len(pd.read_csv(tmp_path / "verdicts.csv")) == 2 * len(asked.plan.questions)
        columns = ["flag", "kind", "block", "metric", "treated_s", "control_s", "ratio"]
        assert list(pd.read_csv(tmp_path / "pairs.csv")) == columns


def test_two_experiments_are_compared_with_a_warning_that_names_what_differs() -> None:
    here = setup()
    there = setup(environment={"processor": "another", "cores": 2}, delta=0.05)
    one, other = (analyse(asked, trials(asked), {}) for asked in (here, there))
    text = exports.compare_two(one, other)
    assert "WARNING" in text
    assert "processor: made up and another" in text
    assert "delta: 0.02 against 0.05" in text
    assert "cores" not in text
    assert "WARNING" not in exports.compare_two(one, one)


def test_a_question_that_only_one_of_two_asked_is_empty_in_the_other() -> None:
    one = analyse(setup(), trials(setup()), {})
    fewer = replace(one, rows=one.rows[:-2])
    lines = exports.compare_two(fewer, one).splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == len(one.rows) + 2
