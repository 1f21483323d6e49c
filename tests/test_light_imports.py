"""What starts at once imports nothing heavy: each check runs in a fresh interpreter.

That the page's process never imports torch is held by every test that runs a page (tests/support/without_torch.py).
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPUTING = ("torch", "transformers", "numba", "accelerate", "safetensors")
SHOWING = ("gradio", "plotly", "pandas")
SAY = "\nprint(*(name for name in {names!r} if name in sys.modules))"
OF_THE_PAGE = ("ui.page", "ui.compare.tab", "ui.lab.tab", "ui.trunk.tab", "ui.app", "splitlearn.lab.job")
LIGHT = (
    "server.__main__",
    "splitlearn",
    "splitlearn.arms.compare",
    "splitlearn.arms.runs",
    "splitlearn.checkpoints.catalogue",
    "splitlearn.cli.main",
    "splitlearn.cli.tables",
    "splitlearn.flags.docs_page",
    "splitlearn.lab.request",
    "splitlearn.loadtest.plan",
    "splitlearn.planning.report",
    "ui.app",
)

AT_ONCE = (
    "--help",
    "--version",
    "models",
    "flags --markdown",
    "compare --max-new-tokens few",
    "lab --pairs 1",
    "loadtest --clients 0",
)


def imported_by(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of `names` a fresh interpreter has imported after `code`."""
    said = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}{SAY.format(names=names)}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return said.stdout.splitlines()[-1].split()


@pytest.mark.parametrize("module", LIGHT)
def test_what_a_command_imports_at_first_is_light(module: str) -> None:
    assert imported_by(f"import {module}", (*COMPUTING, *SHOWING)) == []


@pytest.mark.parametrize("module", OF_THE_PAGE)
def test_the_page_imports_nothing_that_computes(module: str) -> None:
    assert imported_by(f"import {module}", COMPUTING) == []


@pytest.mark.parametrize("line", AT_ONCE)
def test_what_a_command_says_at_once_needs_nothing_heavy(line: str) -> None:
    code = f"""
from splitlearn.cli.main import main
try:
    main({line.split()!r})
except SystemExit:
    pass
"""
    assert imported_by(code, (*COMPUTING, *SHOWING)) == []
