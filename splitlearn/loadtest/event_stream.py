"""A streamed answer of the OpenAI protocol: its server-sent events, read within bounds, and what they say together.

The server is not trusted. A line and an answer have a limit in bytes, nothing is decompressed, and JSON of another
shape than the protocol's counts as saying nothing.
"""

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from splitlearn.errors import EndpointError
from splitlearn.loadtest.clients import AnswerEnd

MAX_LINE_BYTES = 1 << 20
MAX_TOKENS = 10**9
DONE = b"[DONE]"
Json = dict[str, Any]
_SPOKEN = ("reasoning_content", "reasoning", "refusal", "tool_calls")
"""Fields of a delta that have generated tokens in them, beside its content."""


async def data_lines(pieces: AsyncIterator[bytes], most: int) -> AsyncIterator[tuple[float, bytes]]:
    """The data of each event, with the time at which its line was whole.

    In this protocol an event has one line of data, so nothing waits for the empty line behind it. Raises EndpointError
    for a stream of more than `most` bytes and for a longer line than MAX_LINE_BYTES.
    """
    line, total = bytearray(), 0
    async for piece in pieces:
        at, total = time.perf_counter(), total + len(piece)
        if total > most:
            raise EndpointError(f"the answer was longer than {most} bytes")
        first, *others = piece.split(b"\n")
        line += first
        for other in others:
            if line.startswith(b"data:"):
                yield at, bytes(line[len(b"data:") :]).strip()
            line = bytearray(other)
        if len(line) > MAX_LINE_BYTES:
            raise EndpointError(f"a line was longer than {MAX_LINE_BYTES} bytes")


class StreamedAnswer:
    """What the chunks of an answer say together."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._last_at: float | None = None
        self._usage: Json = {}
        self._timings: Json = {}

    @property
    def text(self) -> str:
        """The answer's text so far."""
        return "".join(self._texts)

    def take(self, at: float, data: bytes) -> bool:
        """Add the chunk that came at `at`. Returns whether generated text is in it. Raises EndpointError."""
        chunk = parsed(data)
        if chunk.get("error"):
            raise EndpointError(f"an error in the stream: {message_of(chunk)}")
        self._usage = as_object(chunk.get("usage")) or self._usage
        self._timings = as_object(chunk.get("timings")) or self._timings
        choices = chunk.get("choices")
        choice = as_object(choices[0]) if isinstance(choices, list) and choices else {}
        delta = as_object(choice.get("delta"))
        text = delta.get("content") or choice.get("text") or ""
        self._texts += [text] if isinstance(text, str) else []
        spoken = bool(text) or any(delta.get(name) for name in _SPOKEN)
        if spoken or choice.get("finish_reason"):  # the end token has no text, and its chunk says how the answer ended
            self._last_at = at
        return spoken

    def end(self) -> AnswerEnd:
        """The answer's end, after the last chunk. Raises EndpointError if it cannot be counted."""
        if self._last_at is None:
            raise EndpointError("an answer without text")
        counts = [self._usage.get(name) for name in ("completion_tokens", "prompt_tokens")]
        if not all(isinstance(each, int) and 0 <= each <= MAX_TOKENS for each in counts) or not counts[0]:
            raise EndpointError("no usage at the end of the stream: its tokens cannot be counted")
        own = [seconds(self._timings.get(name)) for name in ("ttft_s", "tpot_s")]
        return AnswerEnd(self._last_at, int(counts[0]), int(counts[1] or 0), *own)


def parsed(data: bytes) -> Json:
    """The JSON object in `data`. Raises EndpointError."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise EndpointError("what came is no JSON object")
    return found


def message_of(body: Json) -> str:
    """What an error envelope says."""
    error = body.get("error")
    said = as_object(error).get("message") or body.get("message") or error
    return said if isinstance(said, str) else ""


def as_object(value: object) -> Json:
    """`value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def seconds(value: object) -> float | None:
    """A number of seconds that a server claims; None for what cannot be one."""
    return float(value) if isinstance(value, int | float) and 0 <= value < MAX_TOKENS else None
