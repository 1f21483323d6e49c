"""The input and output of a generation: records without behaviour.

Times are seconds of one monotonic clock at the client since `t0`, when the prompt was submitted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from splitlearn.errors import InputError
from splitlearn.sampling import SamplingParams

Kind = Literal["full", "split"]
"""Of an arm: the whole model in one process, or client and trunk."""
KINDS: tuple[Kind, ...] = ("full", "split")
FinishReason = Literal["eos", "length", "stop", "cancelled"]
MAX_STOP_STRINGS = 16
MAX_NEW_TOKENS = 1_000_000
MAX_SAMPLES = 16


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and how to continue it.

    `chat` applies the model's chat template, or the named one; False takes the prompt as it is. `samples` answers go in
    step and share each trip to the trunk. Number i is the answer that the seed `sampling.seed` + i gives alone. Raises
    InputError for an empty prompt, text that is not Unicode, a limit below 1, and for several greedy samples.
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
    """Whether a tokenizer accepts `text`: for a byte that it cannot read, Python has half a surrogate pair."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


@dataclass(frozen=True)
class Recovery:
    """A trunk that was lost within a step, and its replacement.

    `seconds` is the step's time at the trunk; `lost` and `found` are addresses. `replayed_tokens` were sent again.
    """

    seconds: float
    lost: str
    found: str
    replayed_tokens: int


@dataclass(frozen=True)
class Reconnecting:
    """The trunk at `lost` is lost, and the client is about to try for the `attempt`th time (from 1) to reach one,
    `seconds` after the step began. It comes within a step; the next event says that the answer goes on."""

    attempt: int
    seconds: float
    lost: str


@dataclass(frozen=True)
class StageTiming:
    """The cost of one step of one stage.

    `ledger` is the time breakdown: seconds on the critical path by part (bottom, encode, wire, queue, trunk, decode,
    recover, top, model). `compile_s` of it went into compilation. Bytes are those on the wire. `overlapped_s` is the
    trunk's time while the client worked itself.
    """

    ledger: Mapping[str, float]
    compile_s: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    recoveries: tuple[Recovery, ...] = ()
    overlapped_s: float = 0.0


@dataclass(frozen=True)
class TokenEvent:
    """The outcome of one step.

    - `time_s`: when the step's tokens were on the host, after t0.
    - `ledger`: the time breakdown since the event before (or since t0). It includes `unattributed`, so it sums to that
      interval. Samples that go in step have their events at the same time and with the same breakdown.
    - `text`: what can be shown now. It lags behind the ids while a character is incomplete or a stop string may follow.
    - `drafts`: how many draft tokens were fed. The accepted ones are all `token_ids` but the last.
    - `overlapped_s`: the trunk's time while the client worked itself; not part of the breakdown.
    - `head_start`: whether a speculative start guessed the right token; None without one.
    - `sample`: the number of the answer, from 0.
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
    """The end of an answer: the reason, the text held back so far, and the prompt's tokens and ids.

    Both include the chat template.
    """

    reason: FinishReason
    text: str
    prompt_tokens: int
    sample: int = 0
    prompt_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A token that could come next: the model's logit for it, and the natural logarithm of its probability."""

    token_id: int
    text: str
    logit: float
    logprob: float


Event = TokenEvent | Done
