"""Functions that a model may call, and its calls of them: records without behaviour. Raises InputError."""

import json
import re
from dataclasses import dataclass
from typing import Any

from splitlearn.errors import InputError

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. `parameters` is the JSON schema of its arguments, as JSON text."""

    name: str
    description: str = ""
    parameters: str = '{"type": "object", "properties": {}}'

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InputError("tools", self.name, "a name of 1 to 64 letters, digits, _ and -")
        json_object("tools", self.parameters)


@dataclass(frozen=True)
class ToolCall:
    """A model's call of the function `name`. `arguments` is a JSON object, as text; a result names the call by `id`."""

    name: str
    arguments: str
    id: str = ""

    def __post_init__(self) -> None:
        json_object("tool_calls", self.arguments)


def json_object(field: str, text: str) -> dict[str, Any]:
    """The JSON object in `text`. Raises InputError, for `field`, where there is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(field, text[:60], "a JSON object")
    return found
