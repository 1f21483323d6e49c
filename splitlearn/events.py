"""The input and output of a generation: records without behaviour.

Times are seconds of one monotonic clock at the client since `t0`, when the prompt was submitted.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from splitlearn.errors import InputError
from splitlearn.response_format import JsonFormat
from splitlearn.sampling import SamplingParams
from splitlearn.tools import Tool, ToolCall

Kind = Literal["full", "split"]
"""Of an arm: the whole model in one process, or client and trunk."""
KINDS: tuple[Kind, ...] = ("full", "split")
Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["eos", "length", "stop", "cancelled"]
MAX_STOP_STRINGS = 16
MAX_NEW_TOKENS = 1_000_000
MAX_SAMPLES = 16
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Message:
    """One message of a conversation: an assistant's may call tools, and a tool's is the result of the call named."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


Prompt = str | tuple[Message, ...] | tuple[int, ...]
"""Text, the messages of a conversation, or token ids, which the model is given as they are."""


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and how to continue it.

    `chat` applies the model's chat template, or the named one; False takes a text as it is. `samples` answers go in
    step and share each trip to the trunk. Number i is the answer that the seed `sampling.seed` + i gives alone. With
    `fit_context`, `max_new_tokens` is lowered to what the model's context has room for. `top_logprobs` asks for the log
    probability of each token, and for so many of the likeliest ones; with `echo`, of the prompt's tokens too.

    The chat template tells the model of `tools`. Without `parallel_tool_calls` its first call ends the answer. With
    `must_call` the answer is one call, of a tool with one of these names, and follows its schema. `response_format`
    holds the answer to JSON, which its end token ends. `kept`: whether later requests may reuse what is
    computed of this one (the flag prefix_cache).

    Raises InputError for an empty prompt, messages without a chat template, text that is not Unicode, a limit below 1,
    for several greedy samples, and for JSON beside `ignore_eos` or tools.
    """

    prompt: Prompt
    max_new_tokens: int = 64
    chat: bool | str = True
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    samples: int = 1
    fit_context: bool = False
    top_logprobs: int | None = None
    echo: bool = False
    tools: tuple[Tool, ...] = ()
    parallel_tool_calls: bool = True
    must_call: tuple[str, ...] = ()
    response_format: JsonFormat | None = None
    kept: bool = True

    def __post_init__(self) -> None:
        _check_prompt(self.prompt, self.chat)
        self._check_ends()
        for stop in self.stop:
            if not _is_unicode(stop):
                raise InputError("stop", stop, "text in UTF-8")
        top = self.top_logprobs
        if top is not None and (isinstance(top, bool) or not isinstance(top, int) or not 0 <= top <= MAX_TOP_LOGPROBS):
            raise InputError("top_logprobs", top, f"a whole number from 0 to {MAX_TOP_LOGPROBS}")
        limit = self.max_new_tokens
        if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MAX_NEW_TOKENS:
            raise InputError("max_new_tokens", limit, f"a whole number from 1 to {MAX_NEW_TOKENS}")
        if len(self.stop) > MAX_STOP_STRINGS or not all(self.stop):
            raise InputError("stop", self.stop, f"at most {MAX_STOP_STRINGS} strings, none of them empty")
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or not 1 <= self.samples <= MAX_SAMPLES:
            raise InputError("samples", self.samples, f"a whole number from 1 to {MAX_SAMPLES}")
        if self.samples > 1 and self.sampling.greedy:
            raise InputError("samples", self.samples, "1, or a temperature above 0: greedy answers are all the same")

    def _check_ends(self) -> None:
        """Raise InputError for tools without a conversation, and for JSON that is not all of the answer."""
        if self.tools and not messages_of(self.prompt):
            raise InputError("tools", len(self.tools), "none, or messages as the prompt")
        if unknown := set(self.must_call) - {tool.name for tool in self.tools}:
            raise InputError("tool_choice", min(unknown), "the name of one of the tools")
        if self.is_held and self.ignore_eos:
            raise InputError("ignore_eos", self.ignore_eos, "false where the form of the answer says when it ends")
        if self.response_format is not None and self.tools:
            raise InputError("tools", len(self.tools), "none with a response_format: the answer is JSON and no call")

    @property
    def is_held(self) -> bool:
        """Whether the answer is held to a form, so that not all tokens can come next."""
        return self.response_format is not None or bool(self.must_call)

    @property
    def text(self) -> str:
        """The prompt for people to read: its text, or that of its messages; of token ids, how many they are."""
        return "\n".join(texts_of(self.prompt)) or f"{len(self.prompt)} token ids"


def texts_of(prompt: Prompt) -> tuple[str, ...]:
    """The texts in a prompt; none of token ids."""
    return (prompt,) if isinstance(prompt, str) else tuple(message.content for message in messages_of(prompt))


def messages_of(prompt: Prompt) -> tuple[Message, ...]:
    """The messages of a prompt that is a conversation."""
    return tuple(each for each in prompt if isinstance(each, Message))


def token_ids_of(prompt: Prompt) -> tuple[int, ...]:
    """The token ids of a prompt that has them."""
    return tuple(each for each in prompt if isinstance(each, int))


def _check_prompt(prompt: Prompt, chat: bool | str) -> None:
    """Raise InputError for what is no prompt."""
    count = 1 if isinstance(prompt, str) else len(prompt) if isinstance(prompt, tuple) else 0
    if not count or count not in (len(texts_of(prompt)), len(token_ids_of(prompt))):
        raise InputError("prompt", prompt, "some text, messages or token ids")
    if chat is False and messages_of(prompt):
        raise InputError("chat", chat, "true, or the name of a chat template, for messages")
    texts = texts_of(prompt)
    if texts and not any(text.strip() for text in texts):
        raise InputError("prompt", prompt, "some text")
    for text in texts:
        if not _is_unicode(text):
            raise InputError("prompt", text, "text in UTF-8")


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
class Mismatch:
    """A spot check that failed: the trunk's answer of `layers` [start, end) to a step of `tokens` at `position` is off
    by `error`, where rounding explains `allowed`. Both are relative to the norm of a row."""

    layers: tuple[int, int]
    position: int
    tokens: int
    error: float
    allowed: float


@dataclass(frozen=True)
class SpotCheckResult:
    """How many of the trunk's answers were computed again here, and which of them were wrong (docs/trust.md)."""

    checked: int = 0
    mismatches: tuple[Mismatch, ...] = ()

    @classmethod
    def of(cls, found: "Iterable[SpotCheckResult]") -> "SpotCheckResult":
        """Several together."""
        each = tuple(found)
        return cls(sum(one.checked for one in each), tuple(wrong for one in each for wrong in one.mismatches))


@dataclass(frozen=True)
class Reconnecting:
    """The trunk at `lost` is lost, and the client is about to try for the `attempt`th time (from 1) to reach one,
    `seconds` after the step began. It comes within a step; the next event says that the answer goes on."""

    attempt: int
    seconds: float
    lost: str


Layers = tuple[int, int]
"""The layers [start, end) of one server of a chain."""
Hops = Mapping[Layers, Mapping[str, float]]
"""The part of each server of a chain in a time breakdown, in the words of the whole one."""


@dataclass(frozen=True)
class StageTiming:
    """The cost of one step of one stage.

    `ledger` is the time breakdown: seconds on the critical path by part (bottom, encode, wire, queue, trunk, decode,
    recover, top, model). `compile_s` of it went into compilation. Bytes are those on the wire. `overlapped_s` is the
    trunk's time while the client worked itself. `hops` is empty for a trunk of one server.
    """

    ledger: Mapping[str, float]
    compile_s: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    recoveries: tuple[Recovery, ...] = ()
    overlapped_s: float = 0.0
    hops: Hops = field(default_factory=dict)


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
    - `logprobs`: for each of `token_ids` its candidate and then the likeliest ones, where the request asks for them.
    - `prompt_logprobs`: the same for the prompt's tokens, with the first step of an `echo`; the first one's is NaN.
    - `calls`: the tool calls that end in this step. Their text is not part of `text`.
    - `hops`: what of `ledger` each server of a chain has; empty for a trunk of one server.
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
    logprobs: tuple[tuple["Candidate", ...], ...] = ()
    prompt_logprobs: tuple[tuple["Candidate", ...], ...] = ()
    calls: tuple[ToolCall, ...] = ()
    hops: Hops = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """The end of an answer: the reason, text and tool calls held back so far, and the prompt's tokens and ids.

    The prompt includes the chat template. `cached_tokens` of it were computed by an earlier answer. `spot_checks` has
    those of the trunk's answers.
    """

    reason: FinishReason
    text: str
    prompt_tokens: int
    sample: int = 0
    prompt_ids: tuple[int, ...] = ()
    cached_tokens: int = 0
    calls: tuple[ToolCall, ...] = ()
    spot_checks: SpotCheckResult = SpotCheckResult()


@dataclass(frozen=True)
class Candidate:
    """A token that could come next: the model's logit for it, and the natural logarithm of its probability."""

    token_id: int
    text: str
    logit: float
    logprob: float


Event = TokenEvent | Done
