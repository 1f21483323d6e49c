"""The candidates for one token of an answer, with their logits.

It generates the answer again, step by step as before: one forward of the whole prefix would round differently.
"""

import math
from collections.abc import Collection, Iterable, Sequence

import torch

from splitlearn.events import Candidate, Event, TokenEvent
from splitlearn.generation.chain import Step
from splitlearn.generation.forward import Forward
from splitlearn.generation.tokenizer import Tokens

LISTED = 5


class LogitsOf:
    """Wraps `forward`, and keeps the logits [V] for token `at` of `sample` (both from 0) in `row`."""

    def __init__(self, forward: Forward, sample: int, at: int) -> None:
        self.row: torch.Tensor | None = None
        self._forward, self._sample, self._at = forward, sample if at else 0, at  # the prompt is fed by sample 0
        self._prompt = 0

    def __call__(self, steps: Sequence[Step]) -> list[torch.Tensor]:
        """The logits of each step."""
        self._prompt = self._prompt or steps[0].end
        logits = self._forward(steps)
        for step, rows in zip(steps, logits, strict=True):
            row = self._prompt + self._at - 1 - (step.end - len(rows))
            if step.sample == self._sample and 0 <= row < len(rows):
                self.row = rows[row].float().cpu().clone()
        return logits


def token_at(events: Iterable[Event], sample: int, at: int) -> int | None:
    """Generate up to token `at` of `sample`, and return its id. None if the answer ended before."""
    ids: list[int] = []
    for event in events:
        if isinstance(event, TokenEvent) and event.sample == sample:
            ids += event.token_ids
            if len(ids) > at:
                return ids[at]
    return None


def likeliest(logits: torch.Tensor, tokens: Tokens, also: Collection[int]) -> tuple[Candidate, ...]:
    """The LISTED likeliest tokens by `logits` [V] and those of `also`, ordered by logit, without masked ones."""
    top = torch.topk(logits, min(LISTED, len(logits))).indices.tolist()
    finite = [token for token in {*top, *also} if math.isfinite(float(logits[token]))]
    return tuple(sorted(_candidates(logits, tokens, finite), key=lambda each: (-each.logit, each.token_id)))


def with_likeliest(logits: torch.Tensor | None, token: int, tokens: Tokens, count: int) -> tuple[Candidate, ...]:
    """The candidate `token` by `logits` [V], then the `count` likeliest ones, without masked ones. Without logits,
    `token` with NaN."""
    if logits is None:
        return (Candidate(token, tokens.decode([token]), math.nan, math.nan),)
    listed = torch.topk(logits, count).indices.tolist()
    finite = [each for each in listed if math.isfinite(float(logits[each]))]
    return tuple(_candidates(logits.float(), tokens, [token, *finite]))


def _candidates(logits: torch.Tensor, tokens: Tokens, ids: Sequence[int]) -> list[Candidate]:
    whole = float(logits.logsumexp(-1))
    values = [float(logits[token]) for token in ids]
    texts = [tokens.decode([token]) for token in ids]
    return [Candidate(*each, each[2] - whole) for each in zip(ids, texts, values, strict=True)]
