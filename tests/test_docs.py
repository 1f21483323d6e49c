"""The docs keep up with the program: every command line in them parses, and every link leads to a file."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from bench.__main__ import BENCHES, SIZES
from server.__main__ import app as server
from splitlearn.cli.main import app as splitlearn
from tests.support import ROOT
from ui.app import app as page
from ui.attacks.actions import PUBLISHED

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/notes").glob("*.md"))]
PROGRAMS = {"splitlearn": splitlearn, "server": server, "app.py": page}
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)

BLOCK = re.compile(r"^ *```(.*)\n((?s:.*?))^ *```$", re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
COMMAND = re.compile(
    r"(?:\w+=\S+ |docker compose exec app )*(?:\.venv/bin/)?"
    r"(?:python -m (splitlearn(?:\.\S+)?|server|bench)|python (app\.py)|(splitlearn|make))(?: (.*))?$"
)


def _options() -> dict[str, set[str]]:
    """The options of every command of the three programs, and under "" all of them and those of bench."""
    found: dict[str, set[str]] = {"": {"--help", *(f"--{size}" for size in SIZES)}}
    for name, app in PROGRAMS.items():
        top = get_command(app)
        below = top.commands if isinstance(top, TyperGroup) else {}
        found[name] = _own(top)
        for command, each in below.items():
            under = each.commands.values() if isinstance(each, TyperGroup) else ()
            found[command] = _own(each).union(*map(_own, under))
        found[""] |= found[name].union(*(found[command] for command in below))
    return found


def _own(command: Any) -> set[str]:
    return {flag for parameter in command.params for flag in parameter.opts}


OPTIONS = _options()


def _code(path: Path) -> Iterator[str]:
    """Lines of fenced blocks without a language, and spans of code outside of blocks."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    for language, block in BLOCK.findall(text):
        yield from [] if language else block.splitlines()
    yield from SPAN.findall(BLOCK.sub("", text))


def _commands(path: Path) -> Iterator[tuple[str, ...]]:
    """The commands in a file, to be typed as they are: the program, and its words."""
    for found in filter(None, map(COMMAND.match, map(str.strip, _code(path)))):
        words = shlex.split(found[4] or "", comments=True)
        end = next((at for at, word in enumerate(words) if word[0] in ">|&"), None)
        yield next(filter(None, found.groups()[:3])), *words[:end]


def _mentions(path: Path) -> Iterator[tuple[str, ...]]:
    """Options alone or behind a command's name, with [brackets] or not: the command, or "", and the words."""
    for line in _code(path):
        command, *words = line.replace("[", " ").replace("]", " ").split() or [""]
        if command.startswith("--"):
            yield "", command, *words
        elif command in OPTIONS.keys() - PROGRAMS and words:
            yield command, *words


def _takes(program: str, words: list[str]) -> bool:
    """The program takes these words. They are parsed, and nothing is run."""
    if program == "make":
        return {*words} <= {*TARGETS}
    if program == "bench":
        return {*words} <= {*BENCHES, "NAME"}
    if program.startswith("splitlearn."):
        return not words and (ROOT / program.replace(".", "/") / "__main__.py").exists()
    if words[:1] == ["COMMAND"] or words in ([], ["--install-completion"]):  # the last would be done
        return {*words[-1:]} <= {*OPTIONS[program], "COMMAND", "--help"}
    values = [word.replace("/etc/splitlearn", str(ROOT)) for word in words]
    found = PROGRAMS[program](args=values, prog_name=program, standalone_mode=False)
    return callable(found) or found == 0


@pytest.mark.parametrize("line", sorted({line for path in PAGES for line in _commands(path)}), ids=" ".join)
def test_every_command_in_the_docs_parses(line: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert _takes(line[0], list(line[1:]))


@pytest.mark.parametrize("path", [*PAGES, ROOT / "config.yaml"], ids=lambda path: path.name)
def test_every_option_that_the_docs_name_exists(path: Path) -> None:
    named = [(words[0], word) for words in _mentions(path) for word in words[1:] if re.match("--[a-z]", word)]
    assert [each for each in named if each[1].rstrip(",") not in OPTIONS[each[0]]] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_in_the_docs_leads_to_a_file(path: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_page_and_the_readme_say_of_attacks_what_their_report_says() -> None:
    report, said = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/results/privacy.md", "README.md"))
    for (model, dtype, cut), (share, prompts) in PUBLISHED.items():
        assert f"\n{model}, {dtype}, trunk" in report
        assert f"| {cut} | none |  | search | {prompts} | {share:.1%} [" in report
        assert f"{prompts} prompts" in said
