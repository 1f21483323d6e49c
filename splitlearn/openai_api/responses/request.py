"""What a client may ask of /v1/responses, and what that is as a `GenerationRequest`.

Nothing is kept between requests, so the whole conversation comes with each. `store` is false whether or not it is
given, and what refers to an earlier response is refused by its name.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from splitlearn.events import GenerationRequest, Message
from splitlearn.openai_api.formats import JsonSchema
from splitlearn.openai_api.messages import ROLES, Choice, Function, FunctionName, Part, conversation, with_tools
from splitlearn.openai_api.requests import CHAT_TOKENS, Sampling
from splitlearn.response_format import FIELD, JsonFormat
from splitlearn.tools import ToolCall

Status = Literal["in_progress", "completed", "incomplete"]


class InputText(Part):
    """A part of a message."""

    type: Literal["input_text"]
    text: str


class OutputText(Part):
    """A part of an answer that is sent back. Here it has neither annotations nor log probabilities."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] = []
    logprobs: Annotated[list[Any], Field(max_length=0)] = []


class _Item(Part):
    """An item of a conversation. One that is sent back has an id and a status."""

    id: str | None = None
    status: Status | None = None


class MessageItem(_Item):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[InputText | OutputText, Field(discriminator="type")]]

    def message(self) -> Message:
        """The same in this program's words."""
        return Message(ROLES[self.role], _text(self.content))


class CallItem(_Item):
    """A tool call of the model's."""

    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1)]
    name: str
    arguments: str

    def message(self) -> Message:
        """The same in this program's words. Raises InputError."""
        return Message("assistant", "", (ToolCall(self.name, self.arguments, self.call_id),))


class ResultItem(_Item):
    """What came of a tool call."""

    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(min_length=1)]
    output: str | list[InputText]

    def message(self) -> Message:
        """The same in this program's words."""
        return Message("tool", _text(self.output), (), self.call_id)


class ResponseTool(Function):
    """A tool."""

    type: Literal["function"]


class ResponseChoice(FunctionName):
    """The tool that must be called."""

    type: Literal["function"]


class SchemaFormat(JsonSchema):
    """What a JSON Schema describes."""

    type: Literal["json_schema"]


class AnyFormat(Part):
    """Free text, or any JSON object."""

    type: Literal["text", "json_object"]

    def json_format(self) -> JsonFormat | None:
        """The same in this program's words."""
        return None if self.type == "text" else JsonFormat()


class TextConfig(Part):
    """The form of the text, and its length, which is the model's own affair: medium is no request."""

    format: Annotated[SchemaFormat | AnyFormat, Field(discriminator="type")] = AnyFormat(type="text")
    verbosity: Literal["medium"] = "medium"


def _kind(item: Any) -> str:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else "message"


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")],
    Discriminator(_kind),
]


class ResponseRequest(Sampling):
    """POST /v1/responses."""

    names: ClassVar[Mapping[str, str]] = {
        "max_tokens": "max_output_tokens",
        FIELD: "text.format",
        **dict.fromkeys(("prompt", "messages", "tool_calls", "tool_call_id"), "input"),
    }
    input: Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: TextConfig = TextConfig()
    tools: list[ResponseTool] = []
    tool_choice: Choice | ResponseChoice = "auto"
    parallel_tool_calls: bool = True
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False

    @field_validator("input", mode="before")
    @classmethod
    def _as_items(cls, given: Any) -> Any:
        """A text is the only message."""
        return [{"role": "user", "content": given}] if isinstance(given, str) else given

    def request(self) -> GenerationRequest:
        """In this program's words. Raises InputError."""
        before = [Message("system", self.instructions)] if self.instructions is not None else []
        prompt = conversation([*before, *_joined([item.message() for item in self.input])])
        tokens = self.max_output_tokens
        request = GenerationRequest(
            prompt,
            CHAT_TOKENS if tokens is None else tokens,
            ignore_eos=self.ignore_eos,
            sampling=self.sampling(),
            fit_context=tokens is None,
            response_format=self.text.format.json_format(),
        )
        return with_tools(request, self.tools, self.tool_choice, self.parallel_tool_calls)


def _text(content: str | Sequence[InputText | OutputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _joined(messages: Sequence[Message]) -> Iterator[Message]:
    """The messages, where calls are part of the assistant's message before them."""
    last: Message | None = None
    for message in messages:
        if last is not None and last.role == "assistant" and message.tool_calls:
            last = replace(last, tool_calls=(*last.tool_calls, *message.tool_calls))
            continue
        if last is not None:
            yield last
        last = message
    if last is not None:
        yield last
