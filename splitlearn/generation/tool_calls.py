"""Reads the tool calls that a model writes into its answer, by transformers' own parser.

A response template says how they are written: the tokenizer's own, or one that transformers ships. It is taken only if
it reads back a call that the model's chat template has written. Like the chat template it is from the model's folder,
and runs in the same process of its own, within bounds.
"""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from splitlearn.checkpoints import chat_template
from splitlearn.checkpoints.chat_template import TemplateFailed
from splitlearn.errors import InputError, ModelError
from splitlearn.events import Message
from splitlearn.runtime import private_apis
from splitlearn.tools import Tool, ToolCall

CALLS = "tool_calls"
_PROBE = Tool("probe_tool", "Probes.", '{"type": "object", "properties": {"word": {"type": "string"}}}')
_CALL = ToolCall(_PROBE.name, '{"word": "argument"}', "a1b2c3d4e")
_RESULT = Message("tool", "outcome", tool_call_id=_CALL.id)
_ANCHORS = ("open", "open_pattern", "close", "close_pattern")


@dataclass(frozen=True)
class CallForm:
    """The text of a whole answer that is one call: `before`, the function's name, `between`, JSON, `after`."""

    before: str
    between: str
    after: str


@dataclass(frozen=True)
class CallSyntax:
    """How a model writes tool calls. `template` is a response template of transformers; `marks` are the special tokens
    that it names: their text is kept for the parser. `form` is None where arguments are not written in JSON."""

    template: dict[str, Any]
    marks: Mapping[int, str]
    form: CallForm | None

    def reader(self, prompt: str, tools: Sequence[Tool], parallel: bool) -> "CallReader":
        """A new reader of one answer to `prompt`, which may have begun the answer; of one call unless `parallel`."""
        return CallReader(self.template, prompt, tools, None if parallel else 1)


def syntax_of(tokenizer: Any, template: str) -> CallSyntax:
    """How the model of this chat template writes tool calls. Raises TemplateFailed if it has none."""
    asked = [Message("user", "Hello")]
    prompt = chat_template.render(tokenizer, template, asked, [_PROBE])
    if _PROBE.name not in prompt:
        raise TemplateFailed("has no place for tools")
    called = [*asked, Message("assistant", "", (_CALL,))]
    before, turn = (chat_template.render(tokenizer, template, each, [_PROBE], header=False) for each in (asked, called))
    if _RESULT.content not in chat_template.render(tokenizer, template, [*called, _RESULT], [_PROBE]):
        raise TemplateFailed("leaves the result of a tool out")
    written = turn[len(commonprefix([before, turn])) :]
    own = getattr(tokenizer, "response_template", None)
    for each in ([own] if own else []) + private_apis.shipped_response_templates():
        if _reads(each, written):
            return CallSyntax(each, _marks(tokenizer, each), _form(prompt, turn, tokenizer.all_special_tokens))
    raise TemplateFailed("writes tool calls in a form that cannot be read here")


class CallReader:
    """Takes the text of one answer as it comes. Returns what is outside of tool calls, and keeps those.

    A region that is no call, or not a whole one, counts as text, without its marks. White space behind a call is shown
    before other text only. With `most` calls it is full and takes no more.
    """

    def __init__(self, template: dict[str, Any], prompt: str, tools: Sequence[Tool], most: int | None = None) -> None:
        functions = [chat_template.as_function(tool) for tool in tools]
        self._parser = _Parser(template, prompt, functions)
        self._fields = template["fields"]
        self._body, self._most, self._count = "", most, 0
        self._behind, self._space = False, ""
        self._new: list[ToolCall] = []

    @property
    def full(self) -> bool:
        """True if it has as many calls as it may."""
        return self._count == self._most

    def feed(self, text: str) -> str:
        """The text to show after `text`."""
        return "" if self.full else self._read(self._parser.feed(text))

    def finish(self) -> str:
        """The rest at the end of the answer."""
        return "" if self.full else self._read(self._parser.finish(), cut=True)

    def take(self) -> tuple[ToolCall, ...]:
        """The calls since the last time."""
        new, self._new = tuple(self._new), []
        return new

    def _read(self, events: Sequence[dict[str, Any]], cut: bool = False) -> str:
        shown = ""
        for event in events:
            if self.full:
                break
            text = self._space + (self._in_call(event) if event["field"] == CALLS else self._outside(event, cut))
            self._behind = self._behind and not text.strip()
            self._space = text if self._behind else ""
            shown += "" if self._space else text
        return shown

    def _in_call(self, event: dict[str, Any]) -> str:
        if event["type"] == "region_close":
            calls = _calls(event["value"])[: None if self._most is None else self._most - self._count]
            self._new += calls
            self._count += len(calls)
            self._behind = self._behind or bool(calls)
            return "" if calls else self._body
        self._body = self._body + event["text"] if event["type"] == "region_chunk" else ""
        return ""

    def _outside(self, event: dict[str, Any], cut: bool) -> str:
        """The text of other regions, such as a chain of thought, is what it is without a parser. The answer's end may
        `cut` one off: the mark of its close was not written."""
        if event["type"] == "region_chunk":
            return str(event["text"])
        field, end = self._fields[event["field"]], "open" if event["type"] == "region_open" else "close"
        written = isinstance(field.get("open"), str) and not (cut and end == "close")
        return str(field.get(end, "")) if written else ""


class _Parser:
    """transformers' parser of one answer, in the process that runs templates. Raises ModelError beyond its limits.

    All pieces of the answer are kept here. That process may end for another's template; the next one gets them again.
    """

    def __init__(self, template: dict[str, Any], prompt: str, functions: Sequence[dict[str, Any]]) -> None:
        self._begin = {"template": template, "prefix": prompt, "tools": functions}
        self._reader, self._pieces = uuid.uuid4().hex, list[str]()

    def feed(self, text: str) -> list[dict[str, Any]]:
        """The events after `text`."""
        self._pieces.append(text)
        return self._events(len(self._pieces) - 1)

    def finish(self) -> list[dict[str, Any]]:
        """The events of the answer's end."""
        return self._events(len(self._pieces), end=True)

    def _events(self, first: int, end: bool = False) -> list[dict[str, Any]]:
        begin = {} if first else self._begin
        request = {"op": "parse", "reader": self._reader, "first": first, "pieces": self._pieces[first:], "end": end}
        try:
            reply = chat_template.ask({**request, **begin})
        except TemplateFailed as error:
            raise ModelError(f"The model's response template cannot read an answer with tools: it {error}.") from error
        return self._events(reply["has"], end) if "has" in reply else list(reply["events"])


def _calls(value: Any) -> list[ToolCall]:
    """The calls that a parser found in a region; none if there is one that is no call of a function with an object."""
    found = []
    for each in value if isinstance(value, list) else [value]:
        function = each.get("function") if isinstance(each, dict) else None
        if not isinstance(function, dict) or not isinstance(name := function.get("name"), str) or not name:
            return []
        arguments = function.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        try:
            found.append(ToolCall(name, text))
        except InputError:
            return []
    return found


def _reads(template: Any, written: str) -> bool:
    """Whether a response template finds the probe's call in what the chat template has written of it."""
    try:
        reader = CallReader(template, "", [_PROBE])
        reader.feed(written)
        reader.finish()
        found = reader.take()
    except Exception:  # of any class: a template of the model's own may be anything
        return False
    return [(call.name, json.loads(call.arguments)) for call in found] == [(_CALL.name, json.loads(_CALL.arguments))]


def _form(prompt: str, turn: str, special: Sequence[str]) -> CallForm | None:
    """The form of the probe's call as a chat template has written it behind `prompt`, up to the token that ends it."""
    if not turn.startswith(prompt):
        return None
    before, name, rest = turn.removeprefix(prompt).partition(_CALL.name)
    between, arguments, after = rest.partition(_CALL.arguments)
    if not (name and arguments):
        return None
    end = min((at for text in special if (at := after.find(text)) >= 0), default=len(after))
    return CallForm(before, between, after[:end].rstrip())


def _marks(tokenizer: Any, template: dict[str, Any]) -> dict[int, str]:
    named = " ".join(str(field.get(key, "")) for field in template["fields"].values() for key in _ANCHORS)
    special = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return {token: text for token, text in special if text in named or re.escape(text) in named}
