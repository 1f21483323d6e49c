"""The sampling parameters of a request; generation/sampler.py applies them."""

import math
from dataclasses import dataclass

from splitlearn.errors import InputError

SEEDS = 2**63


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next token. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 filter nothing.

    `frequency_penalty` is taken from a token's logit for each time that the answer has it, `presence_penalty` once.
    `logit_bias` has token ids and what is added to their logits. Raises InputError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        # Logits divided by less than that overflow float32.
        low = 0.0 if self.temperature == 0 else 1e-3
        _check("temperature", self.temperature, low, 100.0, "0 (greedy) or a number from 0.001 to 100")
        _check("top_p", self.top_p, 1e-6, 1.0, "a number above 0, up to 1 (1 filters nothing)")
        _check("repetition_penalty", self.repetition_penalty, 0.01, 100.0, "a number from 0.01 to 100 (1 is none)")
        for name in ("frequency_penalty", "presence_penalty"):
            _check(name, getattr(self, name), -2.0, 2.0, "a number from -2 to 2 (0 is none)")
        for token, bias in self.logit_bias:
            _check_whole("logit_bias", token, 2**31 - 1, "token ids, whole numbers from 0")
            _check("logit_bias", bias, -100.0, 100.0, "for each token id a number from -100 to 100")
        _check_whole("top_k", self.top_k, 2**31 - 1, "a whole number, 0 or more (0 filters nothing)")
        _check_whole("seed", self.seed, SEEDS - 1, "a whole number from 0 to 2**63 - 1")

    @property
    def greedy(self) -> bool:
        """True if the largest logit is taken and nothing is drawn."""
        return self.temperature == 0.0

    @property
    def takes_the_likeliest(self) -> bool:
        """True if that is the largest of the model's own logits."""
        return self.greedy and self.repetition_penalty == 1.0 and not self.moves_logits

    @property
    def moves_logits(self) -> bool:
        """True if something is added to logits."""
        return bool(self.frequency_penalty or self.presence_penalty or self.logit_bias)


def _check(field: str, value: float, low: float, high: float, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(field, value, expected)
    if not low <= value <= high:
        raise InputError(field, value, expected)


def _check_whole(field: str, value: int, high: int, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
        raise InputError(field, value, expected)
