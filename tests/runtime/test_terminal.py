"""Other people's text is written as it is, wherever it goes."""

import io
import logging
import os
import pty
import re
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from server.__main__ import main as serve
from splitlearn.arms.compare import Comparison, Pairs
from splitlearn.checkpoints.catalogue import CATALOGUE, ModelStatus
from splitlearn.cli import main as command_line
from splitlearn.cli import tables as tables
from splitlearn.flags.registry import FLAGS
from splitlearn.flags.selection import parse
from splitlearn.models.plan import SplitPlan
from splitlearn.runtime import console as runtime_console
from splitlearn.runtime import progress
from splitlearn.runtime.console import PlainTable, console
from splitlearn.runtime.progress import Step
from splitlearn.runtime.terminal import BROKEN_PIPE, guarded, say, visible
from tests.ui.test_ui_view import KNOWN, report

HOSTILE = "a[1:100:2] :100: key:key:value 3:o:4 [bold]x[/] [/] [link=http://x]y\ttab 'quoted' 192.168.0.1 日本 "
LONG = "word " * 100 + "x" * 300


def comparison(text: str, model: str) -> Comparison:
    pairs = Pairs((report("full", [1, 2, 3], text),), (report("split", [1, 2, 3], text),))
    return Comparison(model, SplitPlan(2, 4, 6), parse("none", KNOWN), pairs, 0.0, {})


class Stream(io.TextIOWrapper):
    """stdout or stderr in an encoding, as a pipe or as a terminal."""

    def __init__(self, encoding: str = "utf-8", *, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", newline="")
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    @property
    def written(self) -> str:
        self.flush()
        data: bytes = self.buffer.getvalue()  # type: ignore[attr-defined]
        return data.decode(self.encoding)


Replace = Callable[..., Stream]


@pytest.fixture
def stdout(monkeypatch: pytest.MonkeyPatch) -> Replace:
    def replaced(encoding: str = "utf-8", *, terminal: bool = False) -> Stream:
        stream = Stream(encoding, terminal=terminal)
        monkeypatch.setattr(sys, "stdout", stream)
        return stream

    return replaced


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Replace:
    def replaced(encoding: str = "utf-8", *, terminal: bool = False) -> Stream:
        stream = Stream(encoding, terminal=terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return replaced


@pytest.mark.parametrize("text", [HOSTILE, LONG, "\x1b]0;title\x07\x1b[31mred\r\n\x9b2J", "a\rb\x08"])
def test_a_pipe_gets_text_as_it_is(stdout: Replace, text: str) -> None:
    out = stdout()
    say(text)
    assert out.written == f"{text}\n"


@pytest.mark.parametrize("text", [HOSTILE, LONG])
def test_a_terminal_gets_text_as_it_is_but_for_control_characters(stdout: Replace, text: str) -> None:
    out = stdout(terminal=True)
    say(text)
    assert out.written == f"{text}\n"


def test_no_control_sequence_reaches_a_terminal(stdout: Replace, stderr: Replace) -> None:
    out, err = stdout(terminal=True), stderr(terminal=True)
    say("\x1b]52;c;cm0=\x07 a\rb \x9b2J \x7f \x00 tab\there\nline\r\n")
    say("error: \x1b[2J", stderr=True)
    assert out.written == "␛]52;c;cm0=␇ a␍b \\x9b2J ␡ ␀ tab\there\nline\r\n\n"
    assert err.written == "error: ␛[2J\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_what_an_encoding_lacks_is_replaced(stdout: Replace, stderr: Replace, encoding: str) -> None:
    out, err = stdout(encoding), stderr(encoding)
    say("before 日本 🙂 after")
    say("\udcff path", stderr=True)
    assert out.written == "before \\u65e5\\u672c \\U0001f642 after\n"
    assert err.written == "\\udcff path\n"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_a_table_in_a_pipe_has_its_cells_as_they_are(stdout: Replace, encoding: str) -> None:
    out = stdout(encoding)
    table = PlainTable("head [x] :100:", "b")
    table.add_row("[red]cell[/] :key: " + "w" * 300, Text("styled :o:", "bold"))
    runtime_console.console().print(table)
    assert "[red]cell[/] :key: " + "w" * 300 in out.written
    assert "head [x] :100:" in out.written and "styled :o:" in out.written
    assert "\x1b" not in out.written


def test_a_narrow_terminal_folds_cells_and_cuts_none(stdout: Replace, monkeypatch: pytest.MonkeyPatch) -> None:
    out = stdout(terminal=True)
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("TERM", "xterm")
    table = PlainTable("name")
    table.add_row("w" * 100 + "\x1b[2J")
    runtime_console.console().print(table)
    assert out.written.count("w") == 100 and "\x1b[2J" not in out.written and "…" not in out.written


def names_in(written: str) -> list[str]:
    """The first column of a table, a line of a cell each."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", written)
    return [line.split("│")[1].strip() for line in plain.splitlines() if line.startswith("│")]


@pytest.mark.parametrize(("columns", "whole"), [("80", True), ("40", False)])
def test_names_to_be_typed_are_all_there_and_on_one_line_where_the_terminal_has_room(
    columns: str, whole: bool, stdout: Replace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    models = [ModelStatus(entry.name, str(entry.source), entry, None, 0, None) for entry in CATALOGUE]
    for names, show in (
        (list(FLAGS), partial(tables.print_flags, KNOWN, parse("none", KNOWN))),
        ([entry.name for entry in CATALOGUE], partial(tables.print_models, models, Path("cache"))),
    ):
        out = stdout(terminal=True)
        show()
        found = [name for name in names_in(out.written) if name]
        assert "".join(found) == "".join(names) and "…" not in out.written
        assert not whole or found == names


def test_a_reason_of_a_hostile_trunk_reaches_the_terminal_without_control_characters(
    stdout: Replace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")  # no styles: whatever control character there is comes from the trunk
    out = stdout(terminal=True)
    hostile = KNOWN.with_side("trunk", dict.fromkeys(FLAGS, "no\x1b[2J \x9b2J \x1b]0;title"), KNOWN.auto["trunk"])
    tables.print_flags(hostile, parse("none", KNOWN))
    assert "\x1b" not in out.written and "\x9b" not in out.written
    assert all(word in out.written for word in ("no␛[2J", "\\x9b2J", "␛]0;title"))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_a_comparison_is_printed_with_its_answers_and_all_figures(stdout: Replace, encoding: str) -> None:
    out = stdout(encoding)
    tables.print_comparison(comparison(text=HOSTILE + LONG, model="org/[b]m:100:"))
    written = out.written
    expected = (HOSTILE + LONG).strip().encode(encoding, "backslashreplace").decode(encoding)
    assert written.count(expected) == 2
    assert "org/[b]m:100:, trunk layers" in written
    assert "TTFT" in written and "Tokens of full and split: identical" in written


def test_labels_of_progress_are_no_markup(stderr: Replace, monkeypatch: pytest.MonkeyPatch) -> None:
    err = stderr()
    with progress.on_console() as show:
        show(Step(f"Loading [x] :100: {LONG}"))
    assert err.written == f"Loading [x] :100: {LONG}\n"
    drawn = io.StringIO()
    stderr(terminal=True)
    monkeypatch.setattr(
        "splitlearn.runtime.console.console",
        lambda stderr: Console(file=drawn, force_terminal=True, width=120, emoji=False),
    )
    with progress.on_console() as show:
        show(Step("Loading [red]x[/] :100:\x1b[2J", 1, 2))
        say("kept")
    assert "[red]x[/] :100:␛[2J" in drawn.getvalue()
    assert "kept" not in drawn.getvalue()


def test_what_is_printed_beside_bars_goes_to_stdout(
    stdout: Replace, stderr: Replace, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, drawn = stdout(), io.StringIO()
    stderr(terminal=True)
    monkeypatch.setattr("splitlearn.runtime.console.console", lambda stderr: Console(file=drawn, force_terminal=True))
    with progress.on_console() as show:
        show(Step("Loading", 1, 2))
        say("result")
    assert out.written == "result\n"


def test_a_stderr_that_is_gone_loses_no_result(stdout: Replace, monkeypatch: pytest.MonkeyPatch) -> None:
    out = stdout()
    read, write = os.pipe()
    os.close(read)
    for gone in (None, os.fdopen(write, "w")):
        monkeypatch.setattr(sys, "stderr", gone)
        say("lost", stderr=True)
        say("result")
        with progress.on_console() as show:
            show(Step("Loading"))
    assert out.written == "result\nresult\n"


@pytest.mark.parametrize("print_line", [lambda: say("line"), lambda: console().print(PlainTable("head"))])
def test_a_reader_that_has_gone_ends_a_command_quietly(
    monkeypatch: pytest.MonkeyPatch, stderr: Replace, print_line: Callable[[], None]
) -> None:
    err = stderr()
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w"))

    def command() -> int:
        for _ in range(10_000):
            print_line()
        return 0

    assert guarded(command) == BROKEN_PIPE
    sys.stdout.write("x")
    sys.stdout.flush()
    assert err.written == ""


@pytest.mark.parametrize("main", [lambda: command_line.main(["flags"]), lambda: serve(["token", "bob"])])
def test_every_program_ends_quietly_when_its_reader_has_gone(
    main: Callable[[], int], monkeypatch: pytest.MonkeyPatch, stderr: Replace, request: pytest.FixtureRequest
) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):  # the server has handlers of its own
        request.addfinalizer(partial(signal.signal, number, signal.getsignal(number)))
    request.addfinalizer(partial(logging.captureWarnings, False))
    err = stderr()
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w"))
    assert main() == BROKEN_PIPE
    assert "error" not in err.written


def test_a_real_terminal_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        say("\x1b]0;x\x07")
    assert os.read(master, 100).decode() == "␛]0;x␇\r\n"
    os.close(master)


def test_visible_leaves_all_other_text_alone() -> None:
    text = "".join(map(chr, range(0xA0, 0x3000))) + "\t\n 🙂e\u0301"
    assert visible(text) == text
