"""`splitlearn attack`: what it measures, that a kill loses nothing, and the one line for what cannot be done."""

import builtins
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.cli import main as command_line
from splitlearn.errors import InputError
from splitlearn.generation.tokenizer import Tokens
from splitlearn.privacy import training_text, victims
from splitlearn.privacy.results import FILE, Results, Row
from splitlearn.privacy.scores import Hits, exact, recall
from tests.e2e.test_cli import Refusal, configured, refusal
from tests.support.forks import Fork
from tests.support.trunk import eventually, settings

__all__ = ["refusal"]

SWEEP = ("attack", "--splits", "1,2", "--limit", "4", "--answer-tokens", "3", "--config", "config.yaml")


@pytest.fixture
def folder(files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return configured(tmp_path, settings(files))


def test_a_sweep_scores_every_attack_and_says_so_in_json_and_a_report(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*SWEEP, "--splits", "2"]
    asked = [*command, "--defences", "none,wire_dtype=int8", "--attacks", "nearest,linear,search,answer"]
    assert command_line.main([*asked, "--out", "found", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    lines = {(line["cut"], line["defence"], line["attack"]): line for line in said["results"]}
    cells = [(2, defence, name) for defence in ("none", "wire_dtype=int8") for name in ("search", "answer")]
    assert all(lines[cell]["prompts"] == 4 for cell in cells)
    assert {lines[cell]["prompt"]["value"] for cell in cells if cell[2] == "search"} == {1.0}
    assert {lines[cell]["answer"]["value"] for cell in cells if cell[2] == "answer"} == {1.0}
    assert lines[2, "none", "search"]["by_kind"].keys() == {"prose", "code", "names", "chinese"}
    assert lines[0, "", "frequent"]["prompt"]["value"] < 0.5
    report = (folder / "found" / "report.md").read_text(encoding="utf-8")
    assert "| 2 | wire_dtype=int8 |  | search | 4 | 100.0% [100.0, 100.0] |" in report
    picture = "".join(ElementTree.parse(folder / "found" / "recall.svg").getroot().itertext())
    assert all(text in picture for text in ("linear", "search", "recovered, wire_dtype=int8", "guess, no states"))
    before = (folder / "found" / FILE).read_bytes()
    assert command_line.main([*command, "--attacks", "nearest", "--out", "found"]) == 0
    assert (folder / "found" / FILE).read_bytes() == before, "nothing that is there is done again"
    assert "| 2 | none |  | search | 4 |" in (folder / "found" / "report.md").read_text(encoding="utf-8")


def test_a_killed_sweep_goes_on_without_losing_or_repeating_a_row(folder: Path) -> None:
    file, command = folder / "found" / FILE, [*SWEEP, "--attacks", "nearest,answer", "--out", "found"]
    child = Fork(command_line.main, command, folder, folder / "errors")
    try:
        assert eventually(lambda: file.exists() and file.read_bytes().count(b"\n") > 10, within_s=120)
    finally:
        child.close()
    kept = b"".join(file.read_bytes().splitlines(keepends=True)[:11])
    file.write_bytes(kept + b'{"cut": 1, "de')  # as a kill in the middle of a write leaves it
    assert command_line.main(command) == 0
    assert file.read_bytes().startswith(kept)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    keys = Counter((row["cut"], row["defence"], row["attack"], row["number"]) for row in rows)
    assert set(keys.values()) == {1}
    assert len(keys) == 4 * 2 + 2 * 4 * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--splits", "0"), "splits: 0 cannot be used; expected 1 to 5: behind no layer"),
        (("--splits", "2,6"), "splits: 6 cannot be used"),
        (("--splits", "two"), "splits: 'two'"),
        (("--attacks", "telepathy"), "attacks: 'telepathy' cannot be used; expected some of: nearest, linear"),
        (
            ("--defences", "wire_dtype=int3"),
            "defences: 'wire_dtype=int3' cannot be used; expected some of: none, wire_dtype=",
        ),
        (("--limit", "0"), "limit: 0 cannot be used"),
        (("--answer-tokens", "0"), "answer_tokens: 0 cannot be used"),
        (("--prompts", "empty.txt"), "empty.txt"),
        (("--prompts", "missing.txt"), "missing.txt"),
        (("--prompts", "long.txt"), "prompts, number 2: "),
        (("--prompts", "known.txt"), "prompts, number 1: "),
        (("--prompts", "short.txt", "--out", "other"), "or another --out"),
    ],
)
def test_what_cannot_be_attacked_is_one_line_and_status_2(
    folder: Path, refusal: Refusal, arguments: tuple[str, ...], said: str
) -> None:
    (folder / "empty.txt").write_text("\n \n")
    (folder / "short.txt").write_text("How do cats purr?\n")
    (folder / "long.txt").write_text("How do cats purr?\n" + "word " * 600)
    (folder / "known.txt").write_text(" ".join(training_text.training_text().split()[:40]))
    (folder / "other").mkdir()
    (folder / "other" / FILE).write_text(json.dumps({"format": "splitlearn.attack.1", "model": "another"}) + "\n")
    assert said in refusal.of(folder, "attack", *arguments)


def test_an_attack_that_needs_text_that_is_not_there_is_one_line(
    folder: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "pydoc_data":
            raise ImportError(name)
        return real(name, *rest)

    training_text.training_text.cache_clear()
    monkeypatch.setattr(builtins, "__import__", missing)
    assert "pydoc_data, of which linear learns" in refusal.of(folder, "attack", "--attacks", "linear")


@pytest.fixture
def results(tmp_path: Path) -> Iterator[Results]:
    with Results.open(tmp_path / "found", {"model": "m"}) as opened:
        yield opened


def test_results_are_one_writers(results: Results, tmp_path: Path) -> None:
    from splitlearn.errors import SetupError

    with pytest.raises(SetupError, match="Another program writes"):
        Results.open(tmp_path / "found", {"model": "m"})


def test_a_damaged_file_of_results_is_one_line(tmp_path: Path) -> None:
    row = Row(1, "none", None, "search", 0, "prose", Hits(1, 2), Hits(0, 1))
    with Results.open(tmp_path, {"model": "m"}) as opened:
        opened.add(row)
    with Results.open(tmp_path, {"model": "m"}) as again:
        assert again.rows == [row]
    (tmp_path / FILE).write_text((tmp_path / FILE).read_text() + '{"cut": 1}\n')
    with pytest.raises(InputError, match="that `splitlearn attack` wrote"):
        Results.open(tmp_path, {"model": "m"})


def test_built_in_prompts_are_50_of_each_of_four_kinds_in_turn_and_none_is_in_the_training_text() -> None:
    every = victims.built_in()
    assert len({victim.kind for victim in every[:4]}) == 4
    assert list(Counter(victim.kind for victim in every).values()) == [50] * 4
    assert len({victim.prompt for victim in every}) == len(every)
    training_text.check_disjoint([victim.prompt for victim in every])
    assert not [victim for victim in every if victim.prompt in training_text.training_text()]


def test_recall_counts_tokens_and_its_interval_is_over_prompts() -> None:
    assert recall([Hits(0, 0)]) is None
    even = recall([Hits(9, 10), Hits(1, 10)] * 50)
    assert even is not None and even.value == 0.5 and 0.4 < even.low < 0.45 and 0.55 < even.high < 0.6
    whole = exact([Hits(3, 3)] * 40)
    assert whole is not None and whole.value == 1.0
    assert whole.low == pytest.approx(0.9124, abs=1e-4) and whole.high == 1.0  # Wilson's interval of 40 of 40
    none = exact([Hits(2, 3)] * 40)
    assert none is not None and none.low == 0.0 and none.high == pytest.approx(0.0876, abs=1e-4)


@pytest.mark.weights
def test_built_in_prompts_of_each_kind_are_spread_over_5_to_100_tokens(default_model: ModelFiles) -> None:
    tokens = Tokens.load(default_model.folder, use_fast=True)
    for kind in dict.fromkeys(victim.kind for victim in victims.built_in()):
        lengths = [len(tokens.encode(each.prompt, chat=False)) for each in victims.built_in() if each.kind == kind]
        assert min(lengths) >= 5 and max(lengths) <= 100
        fifths = Counter((length - 5) * 5 // 96 for length in lengths)
        assert len(fifths) == 5 and min(fifths.values()) >= 5, (kind, fifths)
