"""A load test's settings, and its requests: the same ones for the same seed, whatever is loaded."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from splitlearn.errors import InputError
from splitlearn.events import GenerationRequest
from splitlearn.loadtest.lengths import Lengths
from splitlearn.loadtest.texts import words
from splitlearn.loadtest.trace import TraceLine

PROMPTS = Path(__file__).with_name("prompts.txt")
MAX_CLIENTS = 1024
MAX_RATE = 10_000.0
MAX_DURATION_S = 86_400.0
MAX_TURNS = 100
MAX_PREFIX_WORDS = 100_000
MAX_RECORDINGS = 1000
MADE_UP = 1 << 53
"""Made-up prompts there are so many of, that none is asked twice."""
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

    Prompts are `prompts`, or made up: as long as `prompt_words` says, or as a `trace` says, which also has arrivals.
    All begin with the same `prefix_words` words. `answers` has their lengths, by default from 1 / SHORTEST of
    `max_new_tokens` to all of it. A client asks `turns` times within a conversation.

    Raises InputError for a number out of range, an empty prompt, and settings that exclude each other.
    """

    prompts: tuple[str, ...]
    clients: int = 8
    rate: float | None = None
    duration_s: float = 30.0
    replay: bool = False
    max_new_tokens: int = 64
    seed: int = 0
    levels: Levels = Levels()
    prompt_words: Lengths | None = None
    answers: Lengths | None = None
    prefix_words: int = 0
    turns: int = 1
    trace: tuple[TraceLine, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.clients <= MAX_CLIENTS:
            raise InputError("clients", self.clients, f"a whole number from 1 to {MAX_CLIENTS}")
        if self.rate is not None and not 0 < self.rate <= MAX_RATE:
            raise InputError("rate", self.rate, f"requests per second, a number above 0, at most {MAX_RATE:g}")
        if not 0 < self.duration_s <= MAX_DURATION_S:
            raise InputError("duration", self.duration_s, f"seconds, a number above 0, at most {MAX_DURATION_S:g}")
        if self.max_new_tokens < 2:
            raise InputError("max_new_tokens", self.max_new_tokens, "2 or more: TPOT needs a token after the first")
        if self.answers is not None and self.answers.longest < 2:
            raise InputError("answers", str(self.answers), "2 tokens or more: TPOT needs a token after the first")
        if not 1 <= self.turns <= MAX_TURNS:
            raise InputError("turns", self.turns, f"a whole number from 1 to {MAX_TURNS}")
        if not 0 <= self.prefix_words <= MAX_PREFIX_WORDS:
            raise InputError("prefix_words", self.prefix_words, f"a whole number from 0 to {MAX_PREFIX_WORDS}")
        self._check_together()
        for prompt in self.prompts:
            GenerationRequest(prompt, self.max_new_tokens)

    def _check_together(self) -> None:
        if self.trace and (self.rate or self.turns > 1 or self.prompt_words or self.answers or self.prefix_words):
            raise InputError("trace", len(self.trace), "a trace alone: it says when, and how much, each request asks")
        if self.replay and (self.turns > 1 or self.prompt_words or len(self.trace) > MAX_RECORDINGS):
            most = f"one turn, and at most {MAX_RECORDINGS} prompts that are given: each is recorded before"
            raise InputError("replay", self.replay, most)

    @property
    def answer_lengths(self) -> Lengths:
        """The distribution of the answers' tokens, where no trace says them."""
        shortest = max(2, self.max_new_tokens // SHORTEST)
        return self.answers or Lengths("uniform", shortest, self.max_new_tokens)

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest answer."""
        return max((line.new_tokens for line in self.trace), default=self.answer_lengths.longest)

    def texts(self) -> list[str]:
        """The prompts of a load that has a given number of them, in the order of their numbers."""
        return [self.text(number) for number in range(len(self.trace or self.prompts))]

    def text(self, prompt: int, turn: int = 0) -> str:
        """The text of prompt number `prompt`; the first turn of a conversation begins with the shared prefix."""
        if self.trace:
            return self.trace[prompt].prompt(str(self.seed), prompt)
        text = self.prompts[prompt] if self.prompt_words is None else self._made_up(self.prompt_words, prompt)
        return text if turn else self.prefix + text

    @property
    def prefix(self) -> str:
        """What all conversations begin with."""
        return f"{words(self.prefix_words, f'{self.seed}/prefix')}\n\n" if self.prefix_words else ""

    def _made_up(self, lengths: Lengths, prompt: int) -> str:
        key = f"{self.seed}/prompt/{prompt}"
        return words(lengths.draw(random.Random(key)), key)

    def largest(self) -> list[tuple[str, int]]:
        """Prompts to check against a context, with the tokens of their answers: all given ones, or a longest one."""
        if self.trace:
            number = max(range(len(self.trace)), key=lambda at: self.trace[at].words + self.trace[at].new_tokens)
            return [(self.text(number), self.trace[number].new_tokens)]
        if self.prompt_words is None:
            return [(text, self.longest_answer) for text in self.texts()]
        made_up = words(self.prefix_words + self.prompt_words.longest, "longest")
        return [(made_up, self.longest_answer)]


@dataclass(frozen=True)
class LoadRequest:
    """One request: the number of its prompt, and the tokens of its answer (the end token is ignored).

    It is the `turn`th of its conversation, from 0; `rest` are the turns after it.
    """

    prompt: int
    new_tokens: int
    turn: int = 0
    rest: tuple["LoadRequest", ...] = field(default=(), repr=False)


def load_requests(load: LoadTest, stream: int) -> Iterator[LoadRequest]:
    """First requests of conversations, without end. Every prompt is equally likely.

    Each `stream` of a seed is another sequence, whatever the times at which requests are taken.
    """
    dice, lengths = random.Random(f"{load.seed}/{stream}"), load.answer_lengths
    prompts = len(load.prompts) if load.prompt_words is None else MADE_UP
    while True:
        turns = [LoadRequest(dice.randrange(prompts), lengths.draw(dice), turn) for turn in range(load.turns)]
        yield replace(turns[0], rest=tuple(turns[1:]))


def traced_requests(load: LoadTest) -> Iterator[tuple[float, LoadRequest]]:
    """The arrival times and requests of the trace, within the duration."""
    for number, line in enumerate(load.trace):
        if line.at_s <= load.duration_s:
            yield line.at_s, LoadRequest(number, line.new_tokens)


def arrivals(rate: float, duration_s: float, seed: int) -> list[float]:
    """The times of a Poisson process of `rate` per second within `duration_s`: independent exponential gaps."""
    dice, at, times = random.Random(f"{seed}/arrivals"), 0.0, list[float]()
    while (at := at + dice.expovariate(rate)) < duration_s:
        times.append(at)
    return times


def check_lengths(tokens: Sequence[tuple[int, int]], turns: int, context_length: int | None, prefix: int = 0) -> None:
    """Raise InputError if `turns` of the longest prompt and answer do not fit into the context. `tokens` has both of
    each request. Turns after the first lack the `prefix` tokens that each prompt begins with."""
    prompt, new = max(tokens, key=sum)
    room = None if context_length is None else context_length + (turns - 1) * prefix
    if room is None or turns * (prompt + new) <= room:
        return
    fitting = f"prompts of at most {room // turns - new} tokens: the context holds {context_length}"
    found = f"one of {prompt} tokens with {new} new ones" + (f", {turns} turns" if turns > 1 else "")
    raise InputError("prompts", found, fitting)
