"""The response and the typed events of its stream.

An answer is a list of items: a message for text, a function call for each call, in the order in which the model wrote
them. Events tell how the list grows; each has a number, and the last one the whole response.
"""

import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import ClassVar
from uuid import uuid4

from splitlearn.arms.report import ArmReport
from splitlearn.events import Done, Event, FinishReason, GenerationRequest
from splitlearn.openai_api.answers import Found
from splitlearn.openai_api.failures import ApiError
from splitlearn.openai_api.responses.request import ResponseRequest
from splitlearn.openai_api.streaming import Json
from splitlearn.openai_api.writer import figures
from splitlearn.tools import ToolCall


@dataclass
class ResponseWriter:
    """Writes the response to one request. An AnswerWriter."""

    end: ClassVar[str] = ""
    asked: ResponseRequest
    generation: GenerationRequest
    id: str = field(default_factory=lambda: uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    _output: list[Json] = field(default_factory=list)
    _reason: FinishReason | None = None
    _events: int = 0

    def whole(self, events: Sequence[Event], report: ArmReport) -> Json:
        """The response."""
        for event in events:
            self.chunks(event)
        return self._ended(report)

    def first(self) -> list[Json]:
        """The response without output."""
        return [self._event(name, response=self._response("in_progress")) for name in ("created", "in_progress")]

    def chunks(self, item: Found) -> list[Json]:
        """What one event brings; the report brings the whole response."""
        if isinstance(item, ArmReport):
            response = self._ended(item)
            return [self._event(response["status"], response=response)]
        events = list(self._text(item.text)) if item.text else []
        for call in item.calls:
            events += [*self._close("completed"), *self._call(call)]
        if isinstance(item, Done):
            self._reason = item.reason
            events += self._close(self._status)
        return events

    def failure(self, error: ApiError) -> list[Json]:
        """The response as far as it came, and why it did not end."""
        told = {"code": "rate_limit_exceeded" if error.status == 429 else "server_error", "message": str(error)}
        return [self._event("failed", response={**self._response("failed"), "error": told})]

    @property
    def _status(self) -> str:
        return "incomplete" if self._reason == "length" else "completed"

    def _event(self, kind: str, /, **facts: object) -> Json:
        self._events += 1
        return {"type": f"response.{kind}", "sequence_number": self._events - 1, **facts}

    @property
    def _open(self) -> Json | None:
        """The message that text is added to."""
        last = self._output[-1] if self._output else None
        return last if last is not None and last["status"] == "in_progress" else None

    def _text(self, text: str) -> Iterator[Json]:
        if self._open is None:
            item: Json = {
                "type": "message",
                "id": f"msg_{self._number()}",
                "status": "in_progress",
                "role": "assistant",
            }
            yield self._added({**item, "content": []})
            self._output[-1]["content"] = [_part("")]
            yield self._event("content_part.added", **self._place(), part=_part(""))
        self._output[-1]["content"][0]["text"] += text
        yield self._event("output_text.delta", **self._place(), delta=text, logprobs=[])

    def _close(self, status: str) -> Iterator[Json]:
        """The end of the message that is open, if one is."""
        item = self._open
        if item is None:
            return
        part = dict(item["content"][0])
        yield self._event("output_text.done", **self._place(), text=part["text"], logprobs=[])
        yield self._event("content_part.done", **self._place(), part=part)
        item["status"] = status
        yield self._event("output_item.done", output_index=len(self._output) - 1, item=deepcopy(item))

    def _call(self, call: ToolCall) -> Iterator[Json]:
        number = self._number()
        item: Json = {"type": "function_call", "id": f"fc_{number}", "call_id": number[-9:], "name": call.name}
        yield self._added({**item, "arguments": "", "status": "in_progress"})
        at: Json = {"item_id": item["id"], "output_index": len(self._output) - 1}
        yield self._event("function_call_arguments.delta", **at, delta=call.arguments)
        yield self._event("function_call_arguments.done", **at, arguments=call.arguments, name=call.name)
        self._output[-1] |= {"arguments": call.arguments, "status": "completed"}
        yield self._event("output_item.done", output_index=len(self._output) - 1, item=deepcopy(self._output[-1]))

    def _added(self, item: Json) -> Json:
        self._output.append(item)
        return self._event("output_item.added", output_index=len(self._output) - 1, item=deepcopy(item))

    def _number(self) -> str:
        """The end of the next item's id. Its last nine letters and digits, as Mistral's templates want them, are the id
        of a call."""
        return f"{self.id}{len(self._output):03x}"

    def _place(self) -> Json:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1, "content_index": 0}

    def _ended(self, report: ArmReport) -> Json:
        found, cut = figures(report), self._status == "incomplete"
        used = found["usage"]
        usage = {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": report.metrics.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used["total_tokens"],
        }
        details = {"reason": "max_output_tokens"} if cut else None
        response = {**self._response(self._status), "incomplete_details": details, "usage": usage}
        return {**response, "completed_at": None if cut else int(time.time()), "timings": found["timings"]}

    def _response(self, status: str) -> Json:
        """The response so far, with what was asked for."""
        asked, sampling, choice = self.asked, self.generation.sampling, self.asked.tool_choice
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": asked.model,
            "output": [deepcopy(item) for item in self._output],
            "error": None,
            "incomplete_details": None,
            "usage": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "parallel_tool_calls": asked.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "text": asked.text.model_dump(by_alias=True),
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in asked.tools],
            "truncation": asked.truncation,
            "background": False,
            "service_tier": "default",
            "user": asked.user,
        }


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
