"""The messages of a conversation as the protocol has them, with tools and tool calls, and the same in this program's
words."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from splitlearn.errors import InputError
from splitlearn.events import GenerationRequest, Message, Role
from splitlearn.tools import Tool, ToolCall

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


Choice = Literal["none", "auto", "required"]
"""Whether the model is told of the tools, and whether its answer is held to a call of one."""


class Part(BaseModel):
    """A part of a request. It has the fields listed, and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """What is null is not given. Clients send an answer back as they got it, with its nulls."""
        return {key: each for key, each in given.items() if each is not None} if isinstance(given, dict) else given


class TextPart(Part):
    """A part of a message. Only text can be a part."""

    type: Literal["text"]
    text: str


class FunctionCall(Part):
    """The function that was called. `arguments` is JSON text."""

    name: str
    arguments: str


class AssistantCall(Part):
    """A call in an assistant's message. A client may send back its place among the calls, as it came in a stream."""

    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int = 0


class ChatMessage(Part):
    """A message of a conversation. An assistant's may have no text but calls; a tool's names the call that it answers.
    `refusal` is null in every answer that is sent back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: Annotated[list[AssistantCall], Field(min_length=1)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.content is None and self.tool_calls is None:
            raise ValueError("expected content")
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError("only an assistant's message has tool_calls")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("a tool's message has a tool_call_id, and no other")
        return self

    def message(self) -> Message:
        """The same in this program's words; `developer` is another word for `system`. Raises InputError."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        calls = tuple(ToolCall(call.function.name, call.function.arguments, call.id) for call in self.tool_calls or ())
        return Message(ROLES[self.role], text, calls, self.tool_call_id or "")


class Function(Part):
    """A function that the model may call."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = {"type": "object", "properties": {}}
    strict: bool = False

    def tool(self) -> Tool:
        """The same in this program's words. Raises InputError."""
        return Tool(self.name, self.description, json.dumps(self.parameters, ensure_ascii=False))


class ChatTool(Part):
    """A tool of a chat."""

    type: Literal["function"]
    function: Function


class FunctionName(Part):
    """The function that must be called."""

    name: str


class ChatChoice(Part):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


def conversation(messages: list[Message]) -> tuple[Message, ...]:
    """The messages as a prompt. Raises InputError for the result of a call that nobody made."""
    known: set[str] = set()
    for message in messages:
        known.update(call.id for call in message.tool_calls)
        if message.tool_call_id and message.tool_call_id not in known:
            raise InputError("tool_call_id", message.tool_call_id, "the id of a tool call in an earlier message")
    return tuple(messages)


def with_tools(
    request: GenerationRequest, functions: Sequence[Function], choice: Choice | FunctionName, parallel: bool
) -> GenerationRequest:
    """`request` with these tools, and whether one must be called. Raises InputError."""
    tools = () if choice == "none" else tuple(each.tool() for each in functions)
    if choice == "required" and not tools:
        raise InputError("tool_choice", choice, "auto or none without tools")
    held = choice == "required" or isinstance(choice, FunctionName)
    if tools and not held and any(each.strict for each in functions):
        expected = "false, or a tool_choice that requires a call: only there are arguments held to their schema"
        raise InputError("tools", "strict: true", expected)
    every = tuple(tool.name for tool in tools) if choice == "required" else ()
    names = (choice.name,) if isinstance(choice, FunctionName) else every
    return replace(request, tools=tools, must_call=names, parallel_tool_calls=parallel)
