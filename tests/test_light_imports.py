"""What starts at once imports nothing heavy. A fresh interpreter does all of a list, and says after which of it
something heavy was there: each alone imports no more than all together.

That the page's process never imports torch is held by every test that runs a page (tests/support/without_torch.py).
"""

import json
import os
import sys

import pytest

from splitlearn.runtime.environment import DEFAULTS
from tests.support.children import output_of

COMPUTING = ("torch", "transformers", "numba", "accelerate", "safetensors")
SHOWING = ("gradio", "plotly", "pandas")
OF_THE_PAGE = (
    "ui.page",
    "ui.api.openai",
    "ui.compare.tab",
    "ui.lab.tab",
    "ui.trunk.tab",
    "ui.app",
    "splitlearn.lab.job",
)
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


def heavy_after(steps: dict[str, str], heavy: tuple[str, ...]) -> dict[str, list[str]]:
    """Run the code of `steps` in a fresh interpreter, one after the other: after which of them, by name, it has
    imported something of `heavy`."""
    code = f"""
import contextlib, io, json, sys
found = {{}}
for name, code in {steps!r}.items():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        exec(code)
    found[name] = [each for each in {heavy!r} if each in sys.modules]
print(json.dumps({{name: imported for name, imported in found.items() if imported}}))
"""
    return json.loads(output_of([sys.executable, "-c", code]))  # type: ignore[no-any-return]


def test_what_a_command_imports_at_first_is_light() -> None:
    assert heavy_after({module: f"import {module}" for module in LIGHT}, (*COMPUTING, *SHOWING)) == {}


def test_the_page_imports_nothing_that_computes() -> None:
    assert heavy_after({module: f"import {module}" for module in OF_THE_PAGE}, COMPUTING) == {}


def test_what_a_command_says_at_once_needs_nothing_heavy() -> None:
    code = """
from splitlearn.cli.main import main
with contextlib.suppress(SystemExit):
    main({words!r})
"""
    steps = {line: code.format(words=line.split()) for line in AT_ONCE}
    assert heavy_after(steps, (*COMPUTING, *SHOWING)) == {}


def test_what_is_heavy_is_named_with_what_imported_it() -> None:
    assert heavy_after({"light": "pass", "heavy": "import colorsys"}, ("colorsys",)) == {"heavy": ["colorsys"]}


@pytest.mark.parametrize("program", ["ui", "server", "splitlearn.cli"])
def test_grpcs_settings_are_there_before_a_program_loads_it(program: str) -> None:
    code = f"import os, sys, {program}; print('grpc' in sys.modules, os.environ['GRPC_VERBOSITY'])"
    unset = {name: value for name, value in os.environ.items() if name not in DEFAULTS}
    assert output_of([sys.executable, "-c", code], environment=unset) == "False ERROR\n"
