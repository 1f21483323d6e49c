"""The protocol's objects: what a request is answered with, whole or in chunks.

`timings` and `usage` come from the run's metrics (docs/metrics.md). Each answer of a request has an index, its sample.
"""

import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar, Literal
from uuid import uuid4

from splitlearn.arms.report import ArmReport
from splitlearn.events import Candidate, Done, Event, FinishReason, TokenEvent
from splitlearn.openai_api.answers import Found
from splitlearn.openai_api.failures import ApiError
from splitlearn.openai_api.streaming import Json

Form = Literal["chat.completion", "text_completion"]
FINISH: dict[FinishReason, str] = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "stop"}


@dataclass(frozen=True)
class Writer:
    """Writes the objects of `samples` answers to a client, of one `form`, under the model id that it asked for. With
    `echo` the prompt stands before each text; with `usage` a stream's last chunk has it, and the others say null."""

    end: ClassVar[str] = "data: [DONE]\n\n"
    form: Form
    model: str
    samples: int = 1
    echo: bool = False
    usage: bool = False
    id: str = field(default_factory=lambda: uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    _called: Counter[int] = field(default_factory=Counter)
    """Tool calls so far, by sample."""

    def whole(self, events: Sequence[Event], report: ArmReport) -> Json:
        """The answer in one object."""
        before = "".join(text for text, _ in report.texts.prompt) if self.echo else ""
        of_samples = [[each for each in events if each.sample == n] for n in range(len(report.samples))]
        choices = [self._choice(each, before) for each in of_samples]
        return {**self._head(self.form), "choices": choices, **figures(report)}

    def first(self) -> list[Json]:
        """The chunks before anything is generated: in a chat, whose message it is."""
        if self.form == "text_completion":
            return []
        return [self._chunk(sample, {"role": "assistant", "content": ""}) for sample in range(self.samples)]

    def chunks(self, item: Found) -> list[Json]:
        """What one event brings: none for a token of which no text can be shown yet, and whose log probability nobody
        asked for. The report brings the usage, where it was asked for."""
        if isinstance(item, ArmReport):
            return [{**self._head(self._chunked), "choices": [], **figures(item)}] if self.usage else []
        calls = self._calls(item)
        end = self._finish(item) if isinstance(item, Done) else None
        listed = item.logprobs if isinstance(item, TokenEvent) else ()
        if not (item.text or end or listed or calls):
            return []
        delta: Json = {**({"content": item.text} if item.text else {}), **({"tool_calls": calls} if calls else {})}
        return [self._chunk(item.sample, delta, item.text, end, self._logprobs(listed))]

    def failure(self, error: ApiError) -> list[Json]:
        """The error's envelope."""
        return [error.body()]

    @property
    def _chunked(self) -> str:
        return "chat.completion.chunk" if self.form == "chat.completion" else self.form

    def _head(self, kind: str) -> Json:
        prefix = "chatcmpl" if self.form == "chat.completion" else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def _chunk(
        self, index: int, delta: Json, text: str = "", end: str | None = None, logprobs: Json | None = None
    ) -> Json:
        said: Json = {"delta": delta} if self.form == "chat.completion" else {"text": text}
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": end}
        return {**({"usage": None} if self.usage else {}), **self._head(self._chunked), "choices": [choice]}

    def _choice(self, events: Sequence[Event], before: str) -> Json:
        text, steps = before + "".join(event.text for event in events), [e for e in events if isinstance(e, TokenEvent)]
        listed = [each for step in steps for each in (*step.prompt_logprobs, *step.logprobs)]
        found = [call for event in events for call in self._calls(event)]
        calls = [{key: each for key, each in call.items() if key != "index"} for call in found]  # that is a stream's
        end = next((self._finish(event) for event in events if isinstance(event, Done)), "stop")
        said: Json = {"text": text}
        if self.form == "chat.completion":
            message = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
            said = {"message": {**message, "tool_calls": calls} if calls else message}
        return {"index": events[0].sample, **said, "logprobs": self._logprobs(listed), "finish_reason": end}

    def _calls(self, event: Event) -> list[Json]:
        """The tool calls in an event, numbered within their sample. Templates of Mistral take ids of nine letters and
        digits only."""
        found = []
        for at, call in enumerate(event.calls, self._called[event.sample]):
            function = {"name": call.name, "arguments": call.arguments}
            identity = f"{self.id[:6]}{event.sample:x}{at:02x}"
            found.append({"index": at, "id": identity, "type": "function", "function": function})
        self._called[event.sample] += len(found)
        return found

    def _finish(self, event: Done) -> str:
        end = FINISH[event.reason]
        return "tool_calls" if end == "stop" and self._called[event.sample] else end

    def _logprobs(self, listed: Iterable[Sequence[Candidate]]) -> Json | None:
        """What is said of the tokens, each with its own candidate first; None where nothing is."""
        found = list(listed)
        if not found:
            return None
        if self.form == "chat.completion":
            return {"content": [{**_of(own), "top_logprobs": [_of(each) for each in top]} for own, *top in found]}
        return {
            "tokens": [own.text for own, *_ in found],
            "token_logprobs": [_number(own.logprob) for own, *_ in found],
            "top_logprobs": [{each.text: each.logprob for each in top} or None for _, *top in found],
            "text_offset": _offsets([own.text for own, *_ in found]),
        }


def joined(answers: Sequence[Json]) -> Json:
    """One answer to several prompts: the choices of each in turn, and the tokens of all. Timings are a prompt's own, so
    that it has none."""
    choices = [choice for answer in answers for choice in answer["choices"]]
    tokens = ("prompt_tokens", "completion_tokens", "total_tokens")
    return {
        **{key: answers[0][key] for key in ("id", "object", "created", "model")},
        "choices": [{**choice, "index": index} for index, choice in enumerate(choices)],
        "usage": {key: sum(answer["usage"][key] for answer in answers) for key in tokens},
    }


def figures(report: ArmReport) -> Json:
    """Tokens used, and what took how long: the metrics of the first answer, the bytes of the wire, the breakdown of a
    token after the first. And what spot checks found, if there were any."""
    first, generated = report.metrics, sum(each.n_tokens for each in report.samples)
    return {
        "usage": {
            "prompt_tokens": first.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": first.prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": first.cached_tokens},
        },
        "timings": {
            "ttft_s": first.ttft_s,
            "tpot_s": first.tpot_s,
            "tps_request": first.tps,
            "tps_decode": first.decode_tps,
            "e2el_s": first.e2el_s,
            "bytes_up": first.bytes_up,
            "bytes_down": first.bytes_down,
            "time_breakdown_s": first.per_token,
            **({"hops_s": first.hops_per_token} if first.hops else {}),
            **({"spot_checks": asdict(report.spot_checks)} if report.spot_checks.checked else {}),
        },
    }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def _of(candidate: Candidate) -> Json:
    return {"token": candidate.text, "logprob": candidate.logprob, "bytes": list(candidate.text.encode())}


def _offsets(texts: Sequence[str]) -> list[int]:
    return [sum(map(len, texts[:at])) for at in range(len(texts))]
