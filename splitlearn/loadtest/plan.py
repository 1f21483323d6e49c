"""What a person asks for, and the requests that follow from it: the same ones for the same seed."""

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
"""An answer is at least one part in so many of the longest."""


@dataclass(frozen=True)
class Levels:
    """The service levels: a request counts as good when it met both, in seconds."""

    ttft_s: float = 2.0
    tpot_s: float = 0.2

    def __post_init__(self) -> None:
        for name, value in (("ttft", self.ttft_s), ("tpot", self.tpot_s)):
            if not 0 < value <= MAX_DURATION_S:
                raise InputError(name, value, "seconds, a number above 0")


@dataclass(frozen=True)
class Asked:
    """A load in a person's words. `rate` None is closed-loop, otherwise arrivals per second.

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
class Job:
    """One request: which prompt, and how many tokens the answer has (the end token is ignored)."""

    prompt: int
    new_tokens: int


def jobs(asked: Asked, stream: int) -> Iterator[Job]:
    """Requests without end, each prompt as likely as any other, answers from a quarter of the longest to the longest.

    Each `stream` of a seed is another sequence; it does not depend on when its requests are taken.
    """
    dice = random.Random(f"{asked.seed}/{stream}")
    shortest = max(2, asked.max_new_tokens // SHORTEST)
    while True:
        yield Job(dice.randrange(len(asked.prompts)), dice.randint(shortest, asked.max_new_tokens))


def arrivals(rate: float, duration_s: float, seed: int) -> list[float]:
    """The times of a Poisson process of `rate` per second within `duration_s`: independent exponential gaps."""
    dice, at, times = random.Random(f"{seed}/arrivals"), 0.0, list[float]()
    while (at := at + dice.expovariate(rate)) < duration_s:
        times.append(at)
    return times


def check_lengths(prompt_tokens: Sequence[int], asked: Asked, context_length: int | None) -> None:
    """Raise InputError for a prompt that, with the longest answer, does not fit into the context."""
    longest = max(prompt_tokens)
    if context_length is None or longest + asked.max_new_tokens <= context_length:
        return
    fitting = f"prompts of at most {context_length - asked.max_new_tokens} tokens: the context holds {context_length}"
    raise InputError("prompts", f"one of {longest} tokens with {asked.max_new_tokens} new ones", fitting)
