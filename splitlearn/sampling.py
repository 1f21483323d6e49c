"""From the logits of one position to one token id.

`sample` is a pure function of the logits, the parameters, the ids so far and a seeded CPU generator, so that both arms
choose the same token from the same logits. Order of the steps, as in transformers: repetition penalty, temperature,
top-k, top-p, draw.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from splitlearn.errors import InputError, NotFinite

TopK = Callable[[torch.Tensor, int], torch.Tensor]
SEEDS = 2**63
LIKELIEST = (256, 4096)


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 filter nothing.

    Raises InputError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        # Logits divided by less than that overflow float32.
        low = 0.0 if self.temperature == 0 else 1e-3
        _check("temperature", self.temperature, low, 100.0, "0 (greedy) or a number from 0.001 to 100")
        _check("top_p", self.top_p, 1e-6, 1.0, "a number above 0, up to 1 (1 filters nothing)")
        _check("repetition_penalty", self.repetition_penalty, 0.01, 100.0, "a number from 0.01 to 100 (1 is none)")
        _check_whole("top_k", self.top_k, 2**31 - 1, "a whole number, 0 or more (0 filters nothing)")
        _check_whole("seed", self.seed, SEEDS - 1, "a whole number from 0 to 2**63 - 1")

    @property
    def greedy(self) -> bool:
        """True when the largest logit is taken and nothing is drawn."""
        return self.temperature == 0.0

    @property
    def takes_the_likeliest(self) -> bool:
        """True when that logit is the largest of the model's own."""
        return self.greedy and self.repetition_penalty == 1.0


def _check(field: str, value: float, low: float, high: float, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(field, value, expected)
    if not low <= value <= high:
        raise InputError(field, value, expected)


def _check_whole(field: str, value: int, high: int, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
        raise InputError(field, value, expected)


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
