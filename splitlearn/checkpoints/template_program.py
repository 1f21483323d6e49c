"""`python -m splitlearn.checkpoints.template_program`: runs a model's templates for chat_template.py, in a sandbox.

It renders chat templates, and reads tool calls by response templates. Both are transformers' own code. A request is
answered with what was asked for, or with `failed`: the end of a sentence that says why not.
"""

from collections import OrderedDict
from typing import Any

from splitlearn.runtime import private_apis, sandbox_child

MEMORY_BYTES = 256 << 20
_MOST_PARSERS, _MOST_REASON = 256, 500

_parsers: OrderedDict[str, tuple[Any, int]] = OrderedDict()
"""By the reader's id: the parser of an answer, and the number of pieces that it has."""


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request."""
    try:
        return _parsed(request) if request["op"] == "parse" else _rendered(request)
    except MemoryError:
        raise
    except Exception as error:  # of any class: from jinja, or from Python for the template's values
        return {"failed": _reason(error)}


def _rendered(request: dict[str, Any]) -> dict[str, Any]:
    text = private_apis.rendered_chat(
        request["template"], request["messages"], request["tools"], request["header"], request["special_tokens"]
    )
    most = request["most"]
    if len(text) > most:
        return {"failed": f"renders {len(text):,} characters, where {most:,} are the most"}
    return {"text": text}


def _parsed(request: dict[str, Any]) -> dict[str, Any]:
    """The events of the last piece. The parser may be in another child, or in none any more: the reply is then the
    number of pieces that the one here `has`, and the request comes again with those from there on."""
    reader, first = request["reader"], request["first"]
    parser, count = _parsers.pop(reader, (None, 0))
    if first == 0:
        parser, count = private_apis.response_parser(request["template"], request["prefix"], request["tools"]), 0
    if first != count:
        _keep(reader, parser, count)
        return {"has": count}
    events: list[dict[str, Any]] = []
    for piece in request["pieces"]:
        events = parser.feed(piece)
    if request["end"]:
        events = parser.finalize()[1]
    else:
        _keep(reader, parser, count + len(request["pieces"]))
    return {"events": events}


def _keep(reader: str, parser: Any, count: int) -> None:
    if parser is not None:
        _parsers[reader] = parser, count
    if len(_parsers) > _MOST_PARSERS:
        _parsers.popitem(last=False)


def _reason(error: Exception) -> str:
    from jinja2 import TemplateSyntaxError

    said = " ".join(str(error)[:_MOST_REASON].split())
    if isinstance(error, TemplateSyntaxError):
        return f"has a syntax error in line {error.lineno}: {said}"
    return f"says {said or type(error).__name__!r}"


if __name__ == "__main__":
    private_apis.only_chat_parts()
    sandbox_child.serve(answer, MEMORY_BYTES)
