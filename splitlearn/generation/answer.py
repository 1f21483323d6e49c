"""One sample of an answer in progress: its sequence, its next step, and the reason for its end."""

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

import torch

from splitlearn.events import Candidate, Done, FinishReason, GenerationRequest, TokenEvent
from splitlearn.generation.chain import Chain, Step
from splitlearn.generation.detokenizer import Detokenizer
from splitlearn.generation.grammar import Grammar
from splitlearn.generation.sampler import TopK, sample
from splitlearn.generation.sequence import Sequence
from splitlearn.generation.speculation import Speculation
from splitlearn.generation.stop_strings import StopStrings
from splitlearn.generation.tool_calls import CallReader

Logprobs = Callable[[torch.Tensor | None, int], tuple[Candidate, ...]]
"""From the logits [V] of a position, if there are any, and the token there: its candidate, then the likeliest ones."""


@dataclass
class Answer:
    """Sample `number` of an answer to a prompt of `prompt` tokens. Each token of `ends` ends it.

    When the sequence grows beyond `stays_within` tokens, the stages compute it again once, from its first token on.
    `cached` tokens of the prompt are reused (generation/prefix_cache.py).
    """

    number: int
    request: GenerationRequest
    prompt: int
    sequence: Sequence
    chain: Chain
    text: Detokenizer
    stops: StopStrings
    rng: torch.Generator
    ends: Collection[int]
    top_k: TopK
    speculation: Speculation | None
    stays_within: int
    logprobs: Logprobs | None = None
    cached: int = 0
    calls: CallReader | None = None
    grammar: Grammar | None = None
    reason: FinishReason | None = None
    _known: int = 0
    """Tokens before the current step."""
    _drafts: list[int] = field(default_factory=list)
    _logprobs: list[tuple[Candidate, ...]] = field(default_factory=list)
    """Of the current step, as are those of the prompt."""
    _prompt_logprobs: list[tuple[Candidate, ...]] = field(default_factory=list)

    def step(self) -> Step:
        """The next step: the ids that the stages have not computed yet, and drafts."""
        self._known = len(self.sequence)
        if self.sequence.computed and self._known > self.stays_within:
            self.sequence.computed, self.chain.rope_length, self.stays_within = 0, self._known, sys.maxsize
        left, room = self.prompt + self.request.max_new_tokens - self._known, max(0, self.stays_within - self._known)
        position, self._drafts = self.sequence.computed, []
        if self.speculation is not None and position and not self.prefills:
            self._drafts = self.speculation.drafts(self.sequence.ids, min(left - 1, room))
        ids = torch.tensor([[*self.sequence.new, *self._drafts]], dtype=torch.long)
        rows = self.prompt if self._echoes else 1 + len(self._drafts)
        return Step(self.number, self.chain, position, ids, rows, more=left > 1 and room > 0)

    @property
    def prefills(self) -> bool:
        """Whether the next step feeds the prompt, as far as it is not computed yet."""
        return len(self.sequence) == self.prompt

    def fork(self, other: "Answer") -> None:
        """Continue from the prompt, which `other` has fed."""
        self._known = len(self.sequence)
        self.chain.fork(other.chain, self._known)

    def sample(self, logits: torch.Tensor) -> None:
        """Sample a token from each row of `logits` [1 + drafts, V]. Stops after the first token that differs from its
        draft or ends the answer."""
        ids = self.sequence.ids
        self._logprobs.clear()
        if self._echoes and self.logprobs is not None:
            rows = [None, *logits[:-1]]  # nothing comes before the first
            self._prompt_logprobs = [self.logprobs(row, token) for row, token in zip(rows, ids, strict=True)]
            logits = logits[-1:]
        for row, draft in zip(logits, [*self._drafts, None], strict=True):
            if self.grammar is not None:
                row = self.grammar.masked(row)
            ids.append(sample(row, self.request.sampling, ids, self.rng, self.top_k, self.prompt))
            if self.grammar is not None:
                self.grammar.take(ids[-1])
            if self.logprobs is not None:
                self._logprobs.append(self.logprobs(row, ids[-1]))
            if ids[-1] != draft or ids[-1] in self.ends:
                return

    def end_step(self, seconds: float, at: float) -> TokenEvent:
        """The event of a step that took `seconds` and ended at `at`: its tokens, up to one that ends the answer."""
        new, text, kept = self.sequence.ids[self._known :], "", 0
        if self.speculation is not None and self.sequence.computed and self._known > self.prompt:
            self.speculation.came(new, len(self._drafts), seconds)
        self.sequence.computed = len(self.sequence) - 1
        while self.reason is None and kept < len(new):
            piece = self.stops.feed(self.text.feed(new[kept]))
            text += piece if self.calls is None else self.calls.feed(piece)
            kept += 1
            self.reason = self._reason(new[kept - 1], self._known + kept - self.prompt)
        event = TokenEvent(tuple(new[:kept]), text, at, {}, drafts=len(self._drafts), sample=self.number)
        if self.calls is not None:
            event = replace(event, calls=self.calls.take())
        if self.logprobs is None:
            return event
        told, self._prompt_logprobs = tuple(self._prompt_logprobs), []
        return replace(event, logprobs=tuple(self._logprobs[:kept]), prompt_logprobs=told)

    def end(self, reason: FinishReason) -> Done:
        """The end of the answer, with all that was held back."""
        text, ids = self.stops.flush(self.text.flush()), tuple(self.sequence.ids[: self.prompt])
        if self.calls is None:
            return Done(reason, text, self.prompt, self.number, ids, self.cached)
        text = self.calls.feed(text) + self.calls.finish()
        return Done(reason, text, self.prompt, self.number, ids, self.cached, self.calls.take())

    @property
    def _echoes(self) -> bool:
        """Whether the current step feeds the prompt of an `echo`."""
        return self.request.echo and self.logprobs is not None and self._known == self.prompt

    def _reason(self, token: int, generated: int) -> FinishReason | None:
        if self.stops.found or (self.calls is not None and self.calls.full):
            return "stop"
        if token in self.ends:
            return "eos"
        return "length" if generated >= self.request.max_new_tokens else None
