"""From the logits of one position to one token id.

`sample` is a pure function of the logits, the parameters, the ids so far and a seeded CPU generator, so that both arms
choose the same token from the same logits. Order of the steps, as in transformers: repetition penalty, temperature,
top-k, top-p, draw.
"""

import math
from collections.abc import Callable, Sequence

import torch

from splitlearn.errors import NotFinite
from splitlearn.sampling import SamplingParams

TopK = Callable[[torch.Tensor, int], torch.Tensor]
LIKELIEST = (256, 4096)


def random_source(params: SamplingParams) -> torch.Generator:
    """The generator of one request: on the CPU whatever the device, so that a seed means the same everywhere."""
    return torch.Generator(device="cpu").manual_seed(params.seed)


def sample(
    logits: torch.Tensor, params: SamplingParams, previous: Sequence[int], rng: torch.Generator, top_k: TopK
) -> int:
    """Choose a token id from `logits`, float [V], given the ids before it.

    `top_k` masks all but the k largest logits: `top_k_by_sort` or `top_k_by_selection`. A logit of -inf masks a token.
    Raises NotFinite where the largest is no finite number: there is a NaN, or every token is masked.
    """
    if params.repetition_penalty != 1.0:
        logits = _penalise(logits.float(), params.repetition_penalty, previous)
    if params.greedy:
        likeliest = int(logits.argmax().item())  # a NaN, where there is one
        _check_largest(float(logits[likeliest]))
        return likeliest
    scores = logits.float().cpu() / params.temperature
    _check_largest(float(scores.amax(-1)))
    if 0 < params.top_k < scores.shape[-1]:
        scores = top_k(scores, params.top_k)
    if params.top_p < 1.0:
        scores = _top_p(scores, params.top_p)
    # To look a uniform number up in the running sums takes 0.04 ms in place of 0.8 (V = 49,152), but a rounding of any
    # logit then moves the bounds of all later tokens. Here each token has a number of its own.
    return int(torch.multinomial(scores.softmax(-1), 1, generator=rng).item())


def _check_largest(logit: float) -> None:
    if not math.isfinite(logit):
        wrong = f"No token can be chosen: after penalty and temperature the largest logit is {logit}."
        raise NotFinite(f"{wrong} A model.dtype of bfloat16 or float32, or values nearer to 1, may help.")


def top_k_by_sort(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Mask all of `scores` [V] below the k-th largest, found by sorting the whole vocabulary."""
    threshold = torch.sort(scores, descending=True).values[k - 1]
    return scores.masked_fill(scores < threshold, -torch.inf)


def top_k_by_selection(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Mask all of `scores` [V] below the k-th largest, found by torch.topk. Equal to `top_k_by_sort`, ties included."""
    found = torch.topk(scores, k)
    masked = torch.full_like(scores, -torch.inf).scatter_(-1, found.indices, found.values)
    # topk leaves out scores equal to the k-th one when there are more than k: both ways keep every one of them.
    return torch.where(scores == found.values[-1], scores, masked)


def _penalise(logits: torch.Tensor, penalty: float, previous: Sequence[int]) -> torch.Tensor:
    """Repetition penalty of CTRL (Keskar et al. 2019, section 4.1): of each id seen once or more, prompt included."""
    seen = torch.tensor(sorted(set(previous)), dtype=torch.long, device=logits.device)
    scores = logits[seen]
    return logits.scatter(0, seen, torch.where(scores < 0, scores * penalty, scores / penalty))


def _top_p(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the fewest tokens whose probabilities reach `top_p` (Holtzman et al. 2020); at least one.

    As a rule they are among the LIKELIEST, which are found in 0.1 or 0.5 ms, where to sort 49,152 takes 3.
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
