"""Translate what the page shows into Chinese: texts of HTML, of Gradio's components and of charts.

The page is written in English. Its texts are translated on their way to the browser, so that no other code knows of
languages. Texts of visitors and models are not translated: they are in elements with `dir="auto"`, `<code>` or `<pre>`.
"""

import json
import re
from collections.abc import Mapping
from html import escape, unescape
from typing import Any

from ui.language.catalogue import chinese

TAG = re.compile(r"(<[^>]*>)")
NAME = re.compile(r"</?([a-zA-Z0-9]+)")
SAID = re.compile(r'\b(aria-label|title|alt)="([^"]*)"')
INLINE = frozenset({"b", "small", "i", "br"})
VOID = frozenset({"br", "hr", "img", "input", "progress", "rect", "line", "circle", "path"})
RAW = frozenset({"script", "style"})  # with no elements inside
AS_IT_IS = RAW | {"code", "pre", "mark"}
WORDS = ("label", "info", "placeholder")
"""Properties of components that are texts."""
VALUES = frozenset({"button", "markdown"})
"""Components whose value is a text."""


def translated(text: str) -> str:
    """The Chinese of `text`; `text` itself if the catalogue does not have it."""
    inner = text.strip()
    found = chinese(inner) if inner else None
    return text if found is None else text.replace(inner, found, 1)


def html(text: str) -> str:
    """HTML with its texts in Chinese. A sentence with bold words inside is one text."""
    made: list[str] = []
    kept: list[str] = []  # open elements whose content is not translated
    piece: list[str] = []
    for part in (*TAG.split(text), ""):
        tag = NAME.match(part)
        if tag is None or (tag[1] in INLINE and not kept):
            piece.append(part)
            continue
        made += [*_piece(piece, bool(kept)), part if kept else SAID.sub(_attribute, part)]
        piece = []
        _follow(part, tag[1], kept)
    return "".join([*made, *_piece(piece, bool(kept))])


def _follow(part: str, name: str, kept: list[str]) -> None:
    """Track whether the content after the tag `part` is translated."""
    if part.startswith("</") or (kept and kept[-1] in RAW):
        if kept and kept[-1] == name and part.startswith("</"):
            kept.pop()
    elif name not in VOID and not part.endswith("/>") and (kept or name in AS_IT_IS or 'dir="auto"' in part):
        kept.append(name)


def _piece(parts: list[str], as_it_is: bool) -> list[str]:
    """Translate adjacent texts and inline tags: as one text if the catalogue has it, else each by itself."""
    if as_it_is:
        return parts
    whole = "".join(parts)
    if len(parts) > 1 and (plain := translated(whole)) != whole:  # values stay escaped
        return [plain]
    return [each if TAG.fullmatch(each) else _text(each) for each in parts]


def _text(text: str) -> str:
    plain = unescape(text)
    found = translated(plain)
    return text if found == plain else escape(found)


def _attribute(found: "re.Match[str]") -> str:
    return f'{found[1]}="{escape(translated(unescape(found[2])))}"'


def properties(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the properties of a component of this kind, or of an update of one."""
    made = dict(given)
    for name in WORDS:
        if isinstance(made.get(name), str):
            made[name] = translated(made[name])
    if isinstance(made.get("choices"), list | tuple):
        made["choices"] = [_choice(each) for each in made["choices"]]
    if "value" in made:
        made["value"] = value(kind, made["value"])
    return made


def _choice(each: Any) -> Any:
    return (translated(each[0]), each[1]) if isinstance(each, list | tuple) and isinstance(each[0], str) else each


def value(kind: str, given: Any) -> Any:
    """Translate the value of a component of this kind."""
    if isinstance(given, str):
        return html(given) if kind == "html" else translated(given) if kind in VALUES else given
    if kind == "plot" and isinstance(given, Mapping) and isinstance(given.get("plot"), str):
        return {**given, "plot": json.dumps(_figure(json.loads(given["plot"])))}
    return given


def _figure(given: Any) -> Any:
    """Translate every text of a chart."""
    if isinstance(given, dict):
        return {name: _figure(each) for name, each in given.items()}
    if isinstance(given, list):
        return [_figure(each) for each in given]
    return translated(given) if isinstance(given, str) else given
