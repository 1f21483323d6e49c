"""The command beside its commands: version, help, completion, colours, narrow terminals."""

import os
import pty
import re
import subprocess
import sys

import pytest

from splitlearn.cli.main import main
from tests.support import ROOT

COMMANDS = ("compare", "fetch", "flags", "lab", "loadtest", "models", "parts", "report", "serve-trunk", "ui")


def on_a_terminal(*arguments: str, **environment: str) -> str:
    """What `python -m splitlearn` writes where its stdout is a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "splitlearn", *arguments]
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "TERM")}
    with subprocess.Popen(
        command, cwd=ROOT, env={**clean, "TERM": "xterm-256color", **environment}, stdout=theirs, stdin=theirs
    ) as child:
        os.close(theirs)
        written = b""
        try:
            while piece := os.read(ours, 65536):
                written += piece
        except OSError:  # Linux's way to say that the other end is closed
            pass
    os.close(ours)
    assert child.returncode == 0
    return written.decode()


def test_version_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "splitlearn 0.1.0\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("splitlearn lo", "loadtest"),
        ("splitlearn compare --max", "--max-new"),
        ("splitlearn serve-trunk --metrics-p", "--metrics-port"),
        ("splitlearn serve-trunk --port 0 to", "token"),
        ("splitlearn ui --share-w", "--share-without-login"),
    ],
)
def test_the_shell_completes_commands_and_the_options_of_each(words: str, offered: str) -> None:
    asked = {"_SPLITLEARN_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    code = "import sys; sys.argv[0] = 'splitlearn'; from splitlearn.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **asked}, capture_output=True, text=True
    )
    assert offered in done.stdout, done.stderr


def test_completion_can_be_shown_for_a_shell() -> None:
    code = "import sys; sys.argv[0] = 'splitlearn'; from splitlearn.cli.main import main; sys.exit(main())"
    shell = f'{sys.executable} -c "{code}" --show-completion'
    done = subprocess.run(["bash", "-c", f"{shell}; true"], cwd=ROOT, capture_output=True, text=True)
    assert "_SPLITLEARN_COMPLETE=complete_bash" in done.stdout, done.stderr


def test_a_shell_is_not_taught_to_complete_every_python(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--install-completion"]) == 2
    assert "the command `splitlearn` alone" in capsys.readouterr().err


def test_a_narrow_terminal_cuts_nothing_and_no_line_is_wider() -> None:
    for words in (["models"], ["--help"], ["compare", "--help"]):
        said = re.sub("\x1b\\[[0-9;]*m|\r", "", on_a_terminal(*words, COLUMNS="40"))
        lines = [line for line in said.splitlines() if "cache: /" not in line]
        assert lines and max(map(len, lines)) <= 40


def test_no_color_is_kept() -> None:
    assert "\x1b[3" not in on_a_terminal("models", NO_COLOR="1")
