"""What goes into a generation and what comes out of it: plain facts, no behaviour.

Times are seconds of one monotonic clock at the client, counted from `t0`, when the prompt was submitted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from splitlearn.errors import InputError
from splitlearn.sampling import SamplingParams

FinishReason = Literal["eos", "length", "stop", "cancelled"]
MAX_STOP_STRINGS = 16
MAX_NEW_TOKENS = 1_000_000
MAX_SAMPLES = 16


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and how to go on from it.

    `chat` applies the model's chat template, or that of several which it names; False is the prompt as it is.
    `samples` answers are made, which go in step and share each trip to the trunk; number i is the one that the seed
    `sampling.seed` + i gives alone. Raises InputError for an empty prompt, text that is not Unicode, a limit below 1,
    and for more than one sample where nothing is drawn.
    """

    prompt: str
    max_new_tokens: int = 64
    chat: bool | str = True
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    samples: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise InputError("prompt", self.prompt, "some text")
        for name, text in (("prompt", self.prompt), *(("stop", stop) for stop in self.stop)):
            if not _is_unicode(text):
                raise InputError(name, text, "text in UTF-8")
        limit = self.max_new_tokens
        if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MAX_NEW_TOKENS:
            raise InputError("max_new_tokens", limit, f"a whole number from 1 to {MAX_NEW_TOKENS}")
        if len(self.stop) > MAX_STOP_STRINGS or not all(self.stop):
            raise InputError("stop", self.stop, f"at most {MAX_STOP_STRINGS} strings, none of them empty")
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or not 1 <= self.samples <= MAX_SAMPLES:
            raise InputError("samples", self.samples, f"a whole number from 1 to {MAX_SAMPLES}")
        if self.samples > 1 and self.sampling.greedy:
            raise InputError("samples", self.samples, "1, or a temperature above 0: greedy answers are all the same")


def _is_unicode(text: str) -> bool:
    """Whether a tokenizer takes `text`: Python has half a surrogate pair in the place of a byte that it cannot read."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


@dataclass(frozen=True)
class Recovery:
    """A trunk that was lost within a step and found again: the seconds that the step took there, the addresses before
    and after, and how many earlier tokens were sent once more."""

    seconds: float
    lost: str
    found: str
    replayed_tokens: int


@dataclass(frozen=True)
class StageTiming:
    """What one step of one stage cost.

    `ledger` maps the ledger's words (bottom, encode, wire, queue, trunk, decode, recover, top, model) to seconds on the
    critical path; `compile_s` is the part of it that went into compilation; bytes are those of the wire.
    `overlapped_s` are seconds of the trunk's that went by while the client was at work itself.
    """

    ledger: Mapping[str, float]
    compile_s: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    recoveries: tuple[Recovery, ...] = ()
    overlapped_s: float = 0.0


@dataclass(frozen=True)
class TokenEvent:
    """One step's outcome.

    `time_s` is when the step's tokens were on the host, after t0. `ledger` says where the time since the event before
    (or since t0) went, `unattributed` included, so it sums to that interval. `text` is what can be shown now: it lags
    behind the ids while a character is not whole or a stop string may be under way. `drafts` is how many draft tokens
    were fed; those that came true are among `token_ids`, all but the last. `overlapped_s` is beside the ledger:
    what the trunk did while the client was at work itself. `head_start` tells whether the token with which the step had
    been begun was the right one; None if it was begun when that was sure. `sample` is the number of
    the answer, from 0; samples that go in step have their events at the same time and with the same ledger.
    """

    token_ids: tuple[int, ...]
    text: str
    time_s: float
    ledger: Mapping[str, float]
    compile_s: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    recoveries: tuple[Recovery, ...] = ()
    drafts: int = 0
    overlapped_s: float = 0.0
    head_start: bool | None = None
    sample: int = 0


@dataclass(frozen=True)
class Done:
    """The end of an answer: why it ended, the text held back till now, how long the prompt was in tokens, and their
    ids, chat template included."""

    reason: FinishReason
    text: str
    prompt_tokens: int
    sample: int = 0
    prompt_ids: tuple[int, ...] = ()


Event = TokenEvent | Done
