"""A load test's settings, and its requests: the same ones for the same seed."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from splitlearn.errors import InputError
from splitlearn.events import GenerationRequest

PROMPTS = Path(__file__).with_name("prompts.txt")
MAX_CLIENTS = 1024
MAX_RATE = 10_000.0
MAX_DURATION_S = 86_400.0
SHORTEST = 4
"""An answer has at least 1 / SHORTEST of the longest answer's tokens."""


@dataclass(frozen=True)
class Levels:
    """The service levels in seconds; goodput counts requests that meet both."""

    ttft_s: float = 2.0
    tpot_s: float = 0.2

    def __post_init__(self) -> None:
        for name, value in (("ttft", self.ttft_s), ("tpot", self.tpot_s)):
            if not 0 < value <= MAX_DURATION_S:
                raise InputError(name, value, "seconds, a number above 0")


@dataclass(frozen=True)
class LoadTest:
    """The settings of a load test. `rate` is arrivals per second, None for a closed loop.

    Raises InputError for a number out of range and an empty prompt.
    """

    prompts: tuple[str, ...]
    clients: int = 8
    rate: float | None = None
    duration_s: float = 30.0
    replay: bool = False
    max_new_tokens: int = 64
    seed: int = 0
    levels: Levels = Levels()

    def __post_init__(self) -> None:
        if not 1 <= self.clients <= MAX_CLIENTS:
            raise InputError("clients", self.clients, f"a whole number from 1 to {MAX_CLIENTS}")
        if self.rate is not None and not 0 < self.rate <= MAX_RATE:
            raise InputError("rate", self.rate, f"requests per second, a number above 0, at most {MAX_RATE:g}")
        if not 0 < self.duration_s <= MAX_DURATION_S:
            raise InputError("duration", self.duration_s, f"seconds, a number above 0, at most {MAX_DURATION_S:g}")
        if self.max_new_tokens < 2:
            raise InputError("max_new_tokens", self.max_new_tokens, "2 or more: TPOT needs a token after the first")
        for prompt in self.prompts:
            GenerationRequest(prompt, self.max_new_tokens)


@dataclass(frozen=True)
class LoadRequest:
    """One request: the index of its prompt, and the tokens of its answer (the end token is ignored)."""

    prompt: int
    new_tokens: int


def load_requests(load: LoadTest, stream: int) -> Iterator[LoadRequest]:
    """Requests without end. Every prompt is equally likely; answers have 1 / SHORTEST to all of max_new_tokens.

    Each `stream` of a seed is another sequence, whatever the times at which requests are taken.
    """
    dice = random.Random(f"{load.seed}/{stream}")
    shortest = max(2, load.max_new_tokens // SHORTEST)
    while True:
        yield LoadRequest(dice.randrange(len(load.prompts)), dice.randint(shortest, load.max_new_tokens))


def arrivals(rate: float, duration_s: float, seed: int) -> list[float]:
    """The times of a Poisson process of `rate` per second within `duration_s`: independent exponential gaps."""
    dice, at, times = random.Random(f"{seed}/arrivals"), 0.0, list[float]()
    while (at := at + dice.expovariate(rate)) < duration_s:
        times.append(at)
    return times


def check_lengths(prompt_tokens: Sequence[int], load: LoadTest, context_length: int | None) -> None:
    """Raise InputError if the longest prompt and answer do not fit into the context."""
    longest = max(prompt_tokens)
    if context_length is None or longest + load.max_new_tokens <= context_length:
        return
    fitting = f"prompts of at most {context_length - load.max_new_tokens} tokens: the context holds {context_length}"
    raise InputError("prompts", f"one of {longest} tokens with {load.max_new_tokens} new ones", fitting)
