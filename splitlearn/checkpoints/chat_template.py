"""Lists a model's chat templates and renders a prompt with one of them.

A template is a program from the model's folder. transformers runs it in jinja's sandbox. `render` also bounds its
memory and its output, and in the main thread of a process, where a timer can interrupt it, its CPU time.
"""

import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import psutil

from splitlearn.errors import InputError, ModelError
from splitlearn.events import Message
from splitlearn.tools import Tool, json_object

DEFAULT = "default"
INSTEAD = "Without a chat template: generation.chat false, --raw, or Raw prompt on the page"
CPU_S = 5.0
MEMORY_BYTES = 256 << 20
# The most characters that a template may add to the prompt, and how often it may repeat it.
_MOST_CHARACTERS, _MOST_COPIES = 1_000_000, 4
_EXCERPT = 60
# Limits are the process's. Of two threads that set them at once, the later could take the other's for what was before.
_LIMITING = threading.Lock()


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
    text = _applied(tokenizer, template, messages, functions, header)
    most = _MOST_CHARACTERS + _MOST_COPIES * len(f"{messages}{functions}")
    if len(text) > most:
        raise TemplateFailed(f"renders {len(text):,} characters, where {most:,} are the most")
    if not text.strip():
        raise TemplateFailed("renders nothing")
    if any("\ud800" <= each <= "\udfff" for each in text):
        raise TemplateFailed("renders half characters, which UTF-8 cannot hold")
    return text


def _applied(tokenizer: Any, template: str, messages: list[Any], functions: list[Any], header: bool) -> str:
    from jinja2 import TemplateSyntaxError

    chosen = {"tools": functions or None, "chat_template": template, "add_generation_prompt": header}
    try:
        with _LIMITING, _bounded_memory(), bounded_time():
            _refuse_powers(template)
            return str(tokenizer.apply_chat_template(messages, tokenize=False, **chosen))
    except TemplateSyntaxError as error:
        raise TemplateFailed(f"has a syntax error in line {error.lineno}: {error.message}") from error
    except MemoryError as error:
        raise TemplateFailed(f"takes more than {MEMORY_BYTES >> 20} MiB of memory") from error
    except TimeLimit as error:
        raise TemplateFailed(f"takes more than {CPU_S:g} s of CPU time") from error
    except TemplateFailed:
        raise
    except Exception as error:  # from jinja, or from Python for the template's values
        raise TemplateFailed(f"says {' '.join(str(error).split()) or type(error).__name__!r}") from error


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


@lru_cache(maxsize=64)
def _refuse_powers(template: str) -> None:
    """Raise TemplateFailed for the operator **. One power can take hours, and no timer interrupts Python in it."""
    from jinja2 import Environment

    before = ""
    for _, kind, value in Environment().lex(template):
        if (kind, value) == ("operator", "**") and before not in ("(", ","):  # there ** unpacks arguments
            raise TemplateFailed("uses the operator **, which is not allowed in it")
        before = before if kind == "whitespace" else value


def excerpt(prompt: str) -> str:
    """The beginning of a prompt, for a one-line error."""
    return prompt if len(prompt) <= _EXCERPT else f"{prompt[:_EXCERPT]}..."


class TimeLimit(Exception):
    """The CPU time is used up."""


@contextmanager
def bounded_time() -> Iterator[None]:
    """Raise TimeLimit after CPU_S of this process's CPU time."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def late(*_: Any) -> None:
        raise TimeLimit

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Limit this process to MEMORY_BYTES more than it has now."""
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = psutil.Process().memory_info().data + MEMORY_BYTES
    if soft != resource.RLIM_INFINITY:
        most = min(most, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
