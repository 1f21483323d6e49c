"""Server-sent events: an answer on its way to a client."""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, Protocol

from splitlearn.arms.report import ArmReport
from splitlearn.events import Event
from splitlearn.openai_api.answers import Found
from splitlearn.openai_api.failures import ApiError

Json = dict[str, Any]


class AnswerWriter(Protocol):
    """Writes the protocol's objects of one answer. A stream ends with `end`."""

    end: ClassVar[str]

    def whole(self, events: Sequence[Event], report: ArmReport) -> Json:
        """The answer in one object."""

    def first(self) -> list[Json]:
        """The chunks before anything is generated."""

    def chunks(self, item: Found) -> list[Json]:
        """What one event, or the report at the end, brings."""

    def failure(self, error: ApiError) -> list[Json]:
        """The last chunks of an answer that fails in its middle."""


async def stream(writer: AnswerWriter, first: Found, found: AsyncGenerator[Found]) -> AsyncIterator[str]:
    """The events of an answer whose `first` item is there. A failure in its middle is its end."""
    async with aclosing(found):
        for chunk in writer.first():
            yield _event(chunk)
        try:
            for chunk in writer.chunks(first):
                yield _event(chunk)
            async for item in found:
                for chunk in writer.chunks(item):
                    yield _event(chunk)
        except ApiError as error:
            for chunk in writer.failure(error):
                yield _event(chunk)
            return
    yield writer.end


def _event(chunk: Json) -> str:
    name = f"event: {chunk['type']}\n" if "type" in chunk else ""
    return f"{name}data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
