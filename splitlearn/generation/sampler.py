"""Chooses a token id from the logits of one position.

`sample` is a pure function of the logits, the parameters, the ids so far and a seeded CPU generator. So both arms
choose the same token from the same logits. The order of the steps is that of transformers: repetition penalty, other
penalties and bias, temperature, top-k, top-p, draw.
"""

import math
from collections.abc import Callable, Sequence

import torch

from splitlearn.errors import InputError, NotFinite
from splitlearn.sampling import SamplingParams

TopK = Callable[[torch.Tensor, int], torch.Tensor]
LIKELIEST = (256, 4096)


def random_source(params: SamplingParams) -> torch.Generator:
    """The generator of one request: on the CPU whatever the device, so that a seed means the same everywhere."""
    return torch.Generator(device="cpu").manual_seed(params.seed)


def sample(
    logits: torch.Tensor,
    params: SamplingParams,
    previous: Sequence[int],
    rng: torch.Generator,
    top_k: TopK,
    prompt: int = 0,
) -> int:
    """Choose a token id from `logits`, float [V], given the ids before it, the first `prompt` of them the prompt's.

    `top_k` masks all but the k largest logits: `top_k_by_sort` or `top_k_by_selection`. A logit of -inf masks a token.
    Raises NotFinite if the largest is not finite: there is a NaN, or every token is masked.
    """
    if params.repetition_penalty != 1.0:
        logits = _penalise(logits.float(), params.repetition_penalty, previous)
    if params.moves_logits:
        logits = _moved(logits.float(), params, previous[prompt:])
    if params.greedy:
        likeliest = int(logits.argmax().item())  # a NaN, if there is one
        _check_largest(float(logits[likeliest]))
        return likeliest
    scores = logits.float().cpu() / params.temperature
    _check_largest(float(scores.amax(-1)))
    if 0 < params.top_k < scores.shape[-1]:
        scores = top_k(scores, params.top_k)
    if params.top_p < 1.0:
        scores = _top_p(scores, params.top_p)
    # To look a uniform number up in cumulative sums takes 0.04 ms instead of 0.8 (V = 49,152). But then the rounding of
    # one logit moves the bounds of all later tokens. multinomial draws a number for each token.
    return int(torch.multinomial(scores.softmax(-1), 1, generator=rng).item())


def _check_largest(logit: float) -> None:
    if not math.isfinite(logit):
        reason = f"No token can be chosen: after penalty and temperature the largest logit is {logit}."
        raise NotFinite(f"{reason} A model.dtype of bfloat16 or float32, or values nearer to 1, may help.")


def top_k_by_sort(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Mask all of `scores` [V] below the k-th largest, found by sorting the whole vocabulary."""
    threshold = torch.sort(scores, descending=True).values[k - 1]
    return scores.masked_fill(scores < threshold, -torch.inf)


def top_k_by_selection(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Mask all of `scores` [V] below the k-th largest, found by torch.topk. Equal to `top_k_by_sort`, ties included."""
    found = torch.topk(scores, k)
    masked = torch.full_like(scores, -torch.inf).scatter_(-1, found.indices, found.values)
    # topk leaves out some of the scores that equal the k-th one. Both functions keep all of them.
    return torch.where(scores == found.values[-1], scores, masked)


def _penalise(logits: torch.Tensor, penalty: float, previous: Sequence[int]) -> torch.Tensor:
    """Repetition penalty of CTRL (Keskar et al. 2019, section 4.1) for each id seen so far, including the prompt's."""
    seen = torch.tensor(sorted(set(previous)), dtype=torch.long, device=logits.device)
    scores = logits[seen]
    return logits.scatter(0, seen, torch.where(scores < 0, scores * penalty, scores / penalty))


def _moved(logits: torch.Tensor, params: SamplingParams, answer: Sequence[int]) -> torch.Tensor:
    """Frequency and presence penalty, of the answer's ids alone, and bias: logits[v] - count(v) * frequency_penalty -
    (count(v) > 0) * presence_penalty + bias(v), as the OpenAI API defines them. Raises InputError for the bias of an id
    that is none."""
    if unknown := [token for token, _ in params.logit_bias if token >= len(logits)]:
        raise InputError("logit_bias", unknown[0], f"token ids below {len(logits)}")
    counts = torch.zeros_like(logits)
    if answer:
        ids = torch.tensor(answer, dtype=torch.long, device=logits.device)
        counts.index_add_(0, ids, torch.ones_like(ids, dtype=logits.dtype))
    moved = logits - counts * params.frequency_penalty - (counts > 0) * params.presence_penalty
    for token, bias in params.logit_bias:
        moved[token] += bias
    return moved


def _top_p(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the fewest tokens whose probabilities reach `top_p`, at least one (Holtzman et al. 2020).

    Usually they are among the LIKELIEST 256 or 4096, which take 0.1 or 0.5 ms to find. To sort 49,152 takes 3 ms.
    """
    whole = scores.logsumexp(-1)
    for count in (*LIKELIEST, len(scores)):
        found = torch.topk(scores, min(count, len(scores)))
        probabilities = (found.values - whole).exp()
        before = probabilities.cumsum(-1) - probabilities
        if before[-1] >= top_p:
            break
    kept = found.values.masked_fill(before >= top_p, -torch.inf)
    return torch.full_like(scores, -torch.inf).scatter_(-1, found.indices, kept)
