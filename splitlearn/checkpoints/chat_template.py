"""Lists a model's chat templates and renders a prompt with one of them.

A template is a program from the model's folder. transformers runs it in jinja's sandbox, here in a process of its own
(template_program.py), which bounds its CPU time, its memory and its output.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from splitlearn.errors import InputError, ModelError
from splitlearn.events import Message
from splitlearn.runtime.sandbox import Sandbox, SandboxError
from splitlearn.tools import Tool, json_object

DEFAULT = "default"
INSTEAD = "Without a chat template: generation.chat false, --raw, or Raw prompt on the page"
CPU_S = 5.0
# The most characters that a template may add to the prompt, and how often it may repeat it.
_MOST_CHARACTERS, _MOST_COPIES = 1_000_000, 4
_EXCERPT = 60
PROGRAM = Sandbox("splitlearn.checkpoints.template_program")


class TemplateFailed(Exception):
    """A chat template gave no usable text. The message is the end of a sentence that says why."""


def templates(given: object) -> Mapping[str, str]:
    """The templates of a tokenizer by name, from its `chat_template`. One without a name is called default.

    Raises ModelError if `given` is neither a template nor several.
    """
    if given is None:
        return {}
    named = {DEFAULT: given} if isinstance(given, str) else given
    if not isinstance(named, dict) or not all(isinstance(each, str) for pair in named.items() for each in pair):
        raise ModelError(f"The model's chat_template is neither a text nor named texts, but {repr(named)[:_EXCERPT]}.")
    return named


def choose(known: Mapping[str, str], wanted: bool | str) -> tuple[str, str] | None:
    """The name and text of the `wanted` template (True: the default one), or None if none is to be applied.

    Raises InputError for an unknown name, and for True if there are named templates and no default.
    """
    if wanted is False or (wanted is True and not known):
        return None
    name = DEFAULT if wanted is True else wanted
    if name not in known:
        names = f"one of the model's chat templates: {', '.join(sorted(known))}; or false, for none"
        raise InputError("generation.chat", wanted, names if known else "true or false: the model has no chat template")
    return name, known[name]


def check(tokenizer: Any, template: str) -> None:
    """Render two short prompts. Raises TemplateFailed, also if the template leaves the prompt out.

    Templates for messages in parts, such as text and images, often do.
    """
    one, other = (render(tokenizer, template, [Message("user", prompt)]) for prompt in ("Hello", "World"))
    if one == other:
        raise TemplateFailed("leaves the prompt's text out")


def render(
    tokenizer: Any, template: str, conversation: Sequence[Message], tools: Sequence[Tool] = (), header: bool = True
) -> str:
    """Render `tools` and `conversation`, followed by the `header` of an answer.

    As in transformers, control tokens in a message count as control tokens. Raises TemplateFailed.
    """
    messages, functions = _as_messages(conversation), [as_function(tool) for tool in tools]
    request = {
        "op": "render",
        "template": template,
        "messages": messages,
        "tools": functions or None,
        "header": header,
        "special_tokens": tokenizer.special_tokens_map,
        "most": _MOST_CHARACTERS + _MOST_COPIES * len(f"{messages}{functions}"),
    }
    text = ask(request)["text"]
    if not text.strip():
        raise TemplateFailed("renders nothing")
    if any("\ud800" <= each <= "\udfff" for each in text):
        raise TemplateFailed("renders half characters, which UTF-8 cannot hold")
    return str(text)


def prepare() -> None:
    """Start the process that renders, without waiting for it, so that the first prompt does not."""
    PROGRAM.prepare()


def ask(request: Mapping[str, Any]) -> dict[str, Any]:
    """The reply of template_program.py. Raises TemplateFailed."""
    try:
        reply = PROGRAM.ask(request, CPU_S)
    except SandboxError as error:
        raise TemplateFailed(str(error)) from error
    if "failed" in reply:
        raise TemplateFailed(str(reply["failed"]))
    return reply


def as_function(tool: Tool) -> dict[str, Any]:
    """A tool in the form that templates and parsers of transformers take."""
    schema = json_object("tools", tool.parameters)
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": schema},
    }


def _as_messages(conversation: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages in the form that templates take. The result of a call has the function's name, too."""
    names = {call.id: call.name for message in conversation for call in message.tool_calls}
    found: list[dict[str, Any]] = []
    for message in conversation:
        calls = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json_object("tool_calls", call.arguments)},
            }
            for call in message.tool_calls
        ]
        result = message.tool_call_id
        named = {"tool_call_id": result, "name": names.get(result, "")} if result else {}
        found.append(
            {"role": message.role, "content": message.content, **({"tool_calls": calls} if calls else {}), **named}
        )
    return found


def excerpt(prompt: str) -> str:
    """The beginning of a prompt, for a one-line error."""
    return prompt if len(prompt) <= _EXCERPT else f"{prompt[:_EXCERPT]}..."
