"""The catalogue: the Chinese of each English text of the page, read once from zh_CN.toml.

A text with values is found by its template. A value named what or why is itself a text of the catalogue. A template
with {what} matches only if the catalogue has it; one with {why} shows an unknown text untranslated.
"""

import re
import tomllib
from collections.abc import Mapping
from functools import cache, lru_cache
from importlib.resources import files
from string import Formatter

FILE = "zh_CN.toml"
WORDED = re.compile(r"(what|why)\d*")
SHORT = 12  # letters: a shorter template would match too much, so its values are one word and a unit
MOST_FOUND = 4096
LONGEST = 4000  # characters of a text with values; a longer text is not the program's


@cache
def catalogue() -> Mapping[str, str]:
    """English texts and their Chinese, from the file."""
    sections = tomllib.loads(files("ui.language").joinpath(FILE).read_text(encoding="utf-8"))
    found: dict[str, str] = {}
    for section in sections.values():
        found |= section
    return found


@lru_cache(MOST_FOUND)
def chinese(text: str) -> str | None:
    """The Chinese of an English text, or None."""
    exact = catalogue().get(text)
    if exact is not None or len(text) > LONGEST:
        return exact
    for pattern, template in _templates():
        if match := pattern.fullmatch(text):
            values = {name: _value(name, value) for name, value in match.groupdict().items()}
            if None not in values.values():
                return template.format_map(values)
    return None


def _value(name: str, value: str) -> str | None:
    if not WORDED.fullmatch(name):
        return value
    return chinese(value) or (None if name.startswith("what") else value)


@cache
def _templates() -> list[tuple["re.Pattern[str]", str]]:
    """Templates with values, most specific first."""
    with_values = sorted((text for text in catalogue() if names(text)), key=lambda text: (-_literal(text), text))
    return [(_pattern(text), catalogue()[text]) for text in with_values]


def names(template: str) -> frozenset[str]:
    """Names of a template's values."""
    return frozenset(name for _, name, _, _ in Formatter().parse(template) if name)


def _pattern(template: str) -> "re.Pattern[str]":
    value = r"\S+(?: (?:[kMG]?B|ms|s))?" if _literal(template) < SHORT else ".+?"
    parts = [
        re.escape(text) + (f"(?P<{name}>{'.+?' if WORDED.fullmatch(name) else value})" if name else "")
        for text, name, _, _ in Formatter().parse(template)
    ]
    return re.compile("".join(parts), re.DOTALL)


def _literal(template: str) -> int:
    return sum(len(text) for text, *_ in Formatter().parse(template))
