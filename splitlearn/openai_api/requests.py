"""What a client may ask for, and what that is as a `GenerationRequest`.

A parameter that is not listed here is refused by its name: one that is ignored in silence gives answers that look
right. The defaults are the protocol's: a temperature of 1, and a seed that nobody knows.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from splitlearn.errors import InputError
from splitlearn.events import MAX_TOP_LOGPROBS, GenerationRequest, Prompt
from splitlearn.openai_api.formats import ResponseFormat
from splitlearn.openai_api.messages import ChatChoice, ChatMessage, ChatTool, Choice, Part, conversation, with_tools
from splitlearn.sampling import SEEDS, SamplingParams

CHAT_TOKENS = 1024
"""Tokens of a chat answer at most where the request does not say; fewer where the context holds no more."""
COMPLETION_TOKENS = 16
"""The same of a completion: the protocol's own default."""
MAX_PROMPTS = 32
"""Prompts of a completion at most."""


class StreamOptions(Part):
    """`include_usage` adds a last chunk with the usage. Padding against those who watch a network is not made."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Sampling(Part):
    """What all requests have in common. The last ones change nothing: they are labels of the client's own, or can only
    be what is done anyway."""

    names: ClassVar[Mapping[str, str]] = {}
    """What this path calls parameters that have another name in this program and in completions."""
    model: str
    stream: bool = False
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool = False
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"

    def sampling(self) -> SamplingParams:
        """How tokens are chosen. Raises InputError."""
        names = ("top_k", "top_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            seed=secrets.randbelow(SEEDS) if self.seed is None else self.seed,
            logit_bias=tuple((_token(token), bias) for token, bias in (self.logit_bias or {}).items()),
            **given,
        )


class Sampled(Sampling):
    """What chat and completions have in common."""

    n: int = 1
    stop: str | list[str] | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None

    def generation(self, prompt: Prompt, chat: bool, tokens: int | None, otherwise: int) -> GenerationRequest:
        """The request for `tokens` at most, or `otherwise` where none are named. Raises InputError."""
        if self.stream_options is not None and not self.stream:
            raise InputError("stream_options", self.stream_options.model_dump(), "none without stream: true")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return GenerationRequest(
            prompt,
            otherwise if tokens is None else tokens,
            chat,
            self.ignore_eos,
            tuple(stop),
            self.sampling(),
            self.n,
            fit_context=tokens is None,
            top_logprobs=self.candidates(),
        )

    def candidates(self) -> int | None:
        """How many of the likeliest tokens are wanted beside each token; None for no log probabilities at all."""
        raise NotImplementedError


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    names: ClassVar[Mapping[str, str]] = dict.fromkeys(("prompt", "tool_calls", "tool_call_id"), "messages")
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Annotated[list[ChatTool], Field(min_length=1)] | None = None
    tool_choice: Choice | ChatChoice = "auto"
    parallel_tool_calls: bool = True

    def request(self) -> GenerationRequest:
        """In this program's words. Raises InputError."""
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise InputError("max_tokens", self.max_tokens, "the same as max_completion_tokens, or one of the two")
        tokens = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        prompt = conversation([message.message() for message in self.messages])
        request = self.generation(prompt, True, tokens, CHAT_TOKENS)
        wanted = None if self.response_format is None else self.response_format.json_format()
        functions = [each.function for each in self.tools or ()]
        choice = self.tool_choice.function if isinstance(self.tool_choice, ChatChoice) else self.tool_choice
        return with_tools(replace(request, response_format=wanted), functions, choice, self.parallel_tool_calls)

    def candidates(self) -> int | None:
        if not self.logprobs and self.top_logprobs is not None:
            raise InputError("top_logprobs", self.top_logprobs, "none without logprobs: true")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampled):
    """POST /v1/completions. The prompt is text or token ids, taken as they are."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = None
    echo: bool = False
    best_of: int | None = None

    def request(self) -> GenerationRequest:
        """In this program's words. Raises InputError."""
        if self.echo and self.stream:
            raise InputError("echo", self.echo, "false with stream: true")
        if self.best_of not in (None, self.n):
            raise InputError("best_of", self.best_of, "the same as n: each answer is given")
        prompt = next(iter(_prompts(self.prompt)), ())
        return replace(self.generation(prompt, False, self.max_tokens, COMPLETION_TOKENS), echo=self.echo)

    def alone(self) -> "list[CompletionRequest]":
        """A request for each of its prompts. Raises InputError."""
        prompts = _prompts(self.prompt)
        if not 1 <= len(prompts) <= MAX_PROMPTS:
            raise InputError("prompt", f"{len(prompts)} prompts", f"from 1 to {MAX_PROMPTS}")
        if len(prompts) > 1 and self.stream:
            raise InputError("prompt", f"{len(prompts)} prompts", "one with stream: true")
        return [self.model_copy(update={"prompt": prompt}) for prompt in prompts]

    def candidates(self) -> int | None:
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            raise InputError("logprobs", self.logprobs, f"a whole number from 0 to {MAX_TOP_LOGPROBS}")
        return self.logprobs


def _prompts(given: str | Sequence[Any]) -> list[Prompt]:
    """The prompts of a request: texts, or token ids."""
    if isinstance(given, str):
        return [given]
    if given and all(isinstance(each, int) for each in given):
        return [tuple(given)]
    return [each if isinstance(each, str) else tuple(each) for each in given]


def _token(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise InputError("logit_bias", text, "token ids, whole numbers from 0")
    return int(text)
