"""Puts what the page shows into Chinese: the texts of HTML, of Gradio's components and of pictures.

The page is written in English. Its texts are translated where they leave for the browser, so that no other code knows
of languages. What a visitor or a model wrote stays as it is: it stands in elements with `dir="auto"`, in `<code>` and
in `<pre>`.
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
AS_IT_IS = frozenset({"code", "pre", "mark", "script", "style"})
WORDS = ("label", "info", "placeholder")
"""Properties of components that are texts."""
VALUES = frozenset({"button", "markdown"})
"""Components whose value is a text."""


def translated(text: str) -> str:
    """A text in Chinese; as it is where the catalogue does not have it."""
    inner = text.strip()
    found = chinese(inner) if inner else None
    return text if found is None else text.replace(inner, found, 1)


def html(text: str) -> str:
    """HTML with its texts in Chinese. A sentence with letters in bold inside is one text."""
    made: list[str] = []
    kept: list[str] = []  # the open elements whose content stays as it is
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
    """Note whether what comes after the tag `part` stays as it is."""
    if part.startswith("</"):
        if kept and kept[-1] == name:
            kept.pop()
    elif name not in VOID and not part.endswith("/>") and (kept or name in AS_IT_IS or 'dir="auto"' in part):
        kept.append(name)


def _piece(parts: list[str], as_it_is: bool) -> list[str]:
    """Texts and inline tags that stand together: one text of the catalogue, or each for itself."""
    if as_it_is:
        return parts
    whole = "".join(parts)
    if len(parts) > 1 and (said := translated(whole)) != whole:  # values stay escaped
        return [said]
    return [each if TAG.fullmatch(each) else _text(each) for each in parts]


def _text(text: str) -> str:
    said = unescape(text)
    found = translated(said)
    return text if found == said else escape(found)


def _attribute(found: "re.Match[str]") -> str:
    return f'{found[1]}="{escape(translated(unescape(found[2])))}"'


def properties(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The properties of a component of this kind, or of an update of one."""
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
    """What a component of this kind shows."""
    if isinstance(given, str):
        return html(given) if kind == "html" else translated(given) if kind in VALUES else given
    if kind == "plot" and isinstance(given, Mapping) and isinstance(given.get("plot"), str):
        return {**given, "plot": json.dumps(_figure(json.loads(given["plot"])))}
    return given


def _figure(given: Any) -> Any:
    """Every text of a picture."""
    if isinstance(given, dict):
        return {name: _figure(each) for name, each in given.items()}
    if isinstance(given, list):
        return [_figure(each) for each in given]
    return translated(given) if isinstance(given, str) else given
