"""One sample of an answer under way: its sequence, the step that it takes next, and why it ended."""

import sys
from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from splitlearn.events import FinishReason, GenerationRequest, TokenEvent
from splitlearn.generation.chain import Chain, Step
from splitlearn.generation.sampler import TopK, sample
from splitlearn.generation.sequence import Sequence
from splitlearn.generation.speculation import Speculation
from splitlearn.generation.stop_strings import StopStrings
from splitlearn.generation.tokenizer import Detokenizer


@dataclass
class Answer:
    """Sample `number` of an answer to a prompt of `prompt` tokens; it ends with one of `ends`.

    A sequence that grows past `stays_within` tokens is computed anew, once, from its first token on.
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
    reason: FinishReason | None = None
    _known: int = 0
    """Tokens before the step under way."""
    _drafts: list[int] = field(default_factory=list)

    def step(self) -> Step:
        """The next step: the ids that the stages do not have yet, and drafts."""
        self._known = len(self.sequence)
        if self.sequence.computed and self._known > self.stays_within:
            self.sequence.computed, self.chain.rope_length, self.stays_within = 0, self._known, sys.maxsize
        left, room = self.prompt + self.request.max_new_tokens - self._known, max(0, self.stays_within - self._known)
        position = self.sequence.computed
        if self.speculation is not None:
            self._drafts = self.speculation.drafts(self.sequence.ids, min(left - 1, room)) if position else []
        ids = torch.tensor([[*self.sequence.new, *self._drafts]], dtype=torch.long)
        return Step(self.number, self.chain, position, ids, 1 + len(self._drafts), more=left > 1 and room > 0)

    def fork(self, other: "Answer") -> None:
        """Go on from the prompt, which `other` has fed."""
        self._known = len(self.sequence)
        self.chain.fork(other.chain, self._known)

    def sample(self, logits: torch.Tensor) -> None:
        """Add a token for each row of `logits` [1 + drafts, V], up to the first that is not the draft fed at its place
        and that does not end the answer."""
        ids = self.sequence.ids
        for row, draft in zip(logits, [*self._drafts, None], strict=True):
            ids.append(sample(row, self.request.sampling, ids, self.rng, self.top_k))
            if ids[-1] != draft or ids[-1] in self.ends:
                return

    def end_step(self, seconds: float, at: float) -> TokenEvent:
        """What the step, which took `seconds` and ended at `at`, brought, up to a reason to end the answer."""
        new, text, kept = self.sequence.ids[self._known :], "", 0
        if self.speculation is not None and self.sequence.computed:
            self.speculation.came(new, len(self._drafts), seconds)
        self.sequence.computed = len(self.sequence) - 1
        while self.reason is None and kept < len(new):
            text += self.stops.feed(self.text.feed(new[kept]))
            kept += 1
            self.reason = self._reason(new[kept - 1], self._known + kept - self.prompt)
        return TokenEvent(tuple(new[:kept]), text, at, {}, drafts=len(self._drafts), sample=self.number)

    def _reason(self, token: int, generated: int) -> FinishReason | None:
        if self.stops.found:
            return "stop"
        if token in self.ends:
            return "eos"
        return "length" if generated >= self.request.max_new_tokens else None
