"""What a person sees of a long preparation."""

import pytest
from rich.console import Console

from splitlearn.runtime import console, progress, terminal
from splitlearn.runtime.progress import Step


def show_some() -> None:
    with progress.on_console() as show:
        for done in range(4):
            show(Step("Downloading", done, 3))
        show(Step("Converting"))


def test_without_a_terminal_each_step_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    show_some()
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "Downloading\nConverting\n"


def test_on_a_terminal_the_bar_has_the_share_that_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "is_terminal", lambda *, stderr=False: True)
    monkeypatch.setattr(console, "console", lambda stderr: Console(stderr=stderr, force_terminal=True, width=100))
    show_some()
    said = capsys.readouterr()
    assert said.out == ""
    assert "100%" in said.err
    assert "Converting" in said.err


def test_another_librarys_bar_is_reported_to_its_end() -> None:
    seen: list[tuple[int, int]] = []
    bars = progress.reporting_tqdm(lambda bar: seen.append((bar.n, bar.total)))
    for _ in bars(range(1000), desc="Loading"):
        pass
    assert seen[0] == (0, 1000)
    assert seen[-1] == (1000, 1000)
