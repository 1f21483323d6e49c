"""The history on disk: what was appended is read again, bounded, for its owner alone, whatever else the file holds."""

import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ui.history import disk, view
from ui.history.disk import DiskHistory

TIMES = {"ttft_s": 0.2, "tpot_s": 0.03, "tps": 24.0}


def comparison(number: int, **more: Any) -> dict[str, Any]:
    return {
        "when": (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=number)).isoformat(),
        "asked": f"prompt {number}",
        "command": "python -m splitlearn compare",
        "model": "tiny",
        "split": {"start": 2, "end": 4, "n_layers": 6},
        "flags": ["use_cache"],
        "full": {**TIMES, "text": "an answer"},
        "split_run": TIMES,
        "ratios": {"ttft": None, "tpot": {"geometric_mean": 1.2, "least": 1.1, "most": 1.3, "n": 3}},
        "identical_tokens": True,
        **more,
    }


def prompts(history: DiskHistory) -> list[str]:
    return [each.asked for each in history.read().records]


def test_what_is_appended_is_read_newest_first_and_is_the_owners_alone(tmp_path: Path) -> None:
    history = DiskHistory(tmp_path)
    assert history.read().records == ()
    for number in range(3):
        history.add(comparison(number))
    assert prompts(history) == ["prompt 2", "prompt 1", "prompt 0"]
    assert json.loads(history.path.read_text().splitlines()[0]) == comparison(0)
    assert stat.S_IMODE(history.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(history.path.parent.stat().st_mode) == 0o700


def test_the_oldest_go_where_they_are_too_many_or_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = DiskHistory(tmp_path)
    monkeypatch.setattr(disk, "MOST_RECORDS", 3)
    for number in range(5):
        history.add(comparison(number))
    assert prompts(history) == ["prompt 4", "prompt 3", "prompt 2"]
    assert stat.S_IMODE(history.path.stat().st_mode) == 0o600
    monkeypatch.setattr(disk, "MOST_BYTES", 2 * history.path.stat().st_size // 3 + 10)
    history.add(comparison(5))
    assert prompts(history) == ["prompt 5", "prompt 4"]
    monkeypatch.setattr(disk, "MOST_LINE", 10)
    history.add(comparison(6))
    assert history.path.read_bytes().count(b"prompt 6") == 0


def test_lines_that_are_no_comparison_are_skipped_and_counted_and_texts_are_no_html(tmp_path: Path) -> None:
    history = DiskHistory(tmp_path)
    history.add(comparison(0, asked="<b>bold</b>"))
    with history.path.open("ab") as file:
        file.write(b"[" * 100_000 + b"\n{}\n\xff\xfe\n" + b'{"when": "never"}\n')
        file.write(json.dumps(comparison(1, split={"start": "<i>", "end": 4, "n_layers": 6})).encode() + b"\n")
        file.write(json.dumps(comparison(2)).encode()[:50])  # a program was killed here
    history.add(comparison(3))
    found = history.read()
    assert ([each.asked for each in found.records], found.skipped) == (["prompt 3", "<b>bold</b>"], 5)
    drawn = view.earlier(found, kept=True)
    assert "&lt;b&gt;bold" in drawn and "<b>bold" not in drawn
    assert "left out: 5" in drawn


def test_an_empty_history_says_where_the_file_is_and_what_turns_it_on(tmp_path: Path) -> None:
    drawn = view.earlier(DiskHistory(tmp_path).read(), kept=False)
    assert "None yet." in drawn and "comparisons.jsonl" in drawn and "ui.history_file" in drawn
