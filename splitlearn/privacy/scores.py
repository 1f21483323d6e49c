"""How much of prompts and answers was recovered: recall per token and exact matches, with intervals over prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from splitlearn.privacy.registry import Recovered

if TYPE_CHECKING:
    from splitlearn.privacy.split_model import VictimSession

RESAMPLES = 2000
Z = 1.959964
"""Of the normal distribution, for 95%."""


@dataclass(frozen=True)
class Hits:
    """How many tokens of a part of a session were recovered, each with the right id at its place."""

    right: int
    tokens: int


@dataclass(frozen=True)
class Loss:
    """The negative log-likelihood of so many tokens, in nats, summed."""

    nats: float
    tokens: int


@dataclass(frozen=True)
class Estimate:
    """A share with its 95% interval over prompts."""

    value: float
    low: float
    high: float


def score(session: "VictimSession", recovered: Recovered, reads: str) -> tuple[Hits, Hits]:
    """The hits in the prompt and in the answer, of what an attack could see.

    The last token of an answer is never sent, and an attack on what was returned sees no prompt.
    """
    prompt, answer = session.prompt_ids, session.answer_ids
    own, rest = recovered[: len(prompt)], recovered[len(prompt) :]
    if reads == "returned":
        return Hits(0, 0), _hits(answer, rest)
    return _hits(prompt, own), _hits(answer[:-1], rest)


def perplexity(losses: Sequence[Loss]) -> float | None:
    """exp(mean negative log-likelihood of a token). None without tokens."""
    tokens = sum(each.tokens for each in losses)
    return math.exp(sum(each.nats for each in losses) / tokens) if tokens else None


def recall(hits: Sequence[Hits], seed: int = 0) -> Estimate | None:
    """The share of all tokens that were recovered. None without tokens.

    Its interval is the percentile bootstrap over prompts: a prompt's tokens are not independent of each other.
    """
    right, tokens = (np.array([getattr(each, name) for each in hits], dtype=float) for name in ("right", "tokens"))
    if not tokens.sum():
        return None
    drawn = np.random.default_rng(seed).integers(len(hits), size=(RESAMPLES, len(hits)))
    shares = right[drawn].sum(1) / np.maximum(tokens[drawn].sum(1), 1)
    low, high = np.percentile(shares, (2.5, 97.5))
    return Estimate(float(right.sum() / tokens.sum()), float(low), float(high))


def exact(hits: Sequence[Hits]) -> Estimate | None:
    """The share of the prompts, or answers, of which every token was recovered, with Wilson's interval (JASA 22, 1927).
    None without any."""
    whole = [each.right == each.tokens for each in hits if each.tokens]
    n = len(whole)
    if not n:
        return None
    share = sum(whole) / n
    middle, half = share + Z**2 / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    low, high = ((middle + side * half) / (1 + Z**2 / n) for side in (-1, 1))
    return Estimate(share, max(0.0, low), min(1.0, high))


def _hits(truth: Sequence[int], found: Sequence[int | None]) -> Hits:
    return Hits(sum(one == other for one, other in zip(truth, found, strict=False)), len(truth))
