"""From what a person asks for to a checked `Setup`: the same for the command line and the page."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from splitlearn.arms.runs import Runs
from splitlearn.errors import InputError
from splitlearn.events import GenerationRequest
from splitlearn.flags.selection import check
from splitlearn.lab.design import DESIGNS, Design, plan
from splitlearn.lab.environment import fingerprint
from splitlearn.lab.records import Setup

DELTA = 0.02
MAX_PAIRS = 72
MINUTES = 60.0
PROMPTS_LIMIT = 1000


@dataclass(frozen=True)
class Asked:
    """An experiment in a person's words. `pairs` None goes on until all is decided, or `minutes` are over; a number of
    pairs has no limit of time.

    Raises InputError for words that can mean no flags, a number out of range and no prompt.
    """

    flags: str
    design: Design = "without"
    pairs: int | None = None
    minutes: float | None = MINUTES
    delta: float = DELTA
    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.flags)
        if self.design not in DESIGNS:
            raise InputError("design", self.design, f"one of: {', '.join(DESIGNS)}")
        if self.pairs is not None and not 2 <= self.pairs <= 10_000:
            raise InputError("pairs", self.pairs, "a whole number from 2 to 10000")
        if self.minutes is not None and not 0 < self.minutes <= 10_000:
            raise InputError("minutes", self.minutes, "a number above 0, at most 10000")
        if not 0.001 <= self.delta <= 0.5:
            raise InputError("delta", self.delta, "a number from 0.001 to 0.5, such as 0.02 for 2%")
        if self.max_new_tokens < 2:
            raise InputError("max_new_tokens", self.max_new_tokens, "2 or more: TPOT needs a token after the first")
        for prompt in self.prompts:
            GenerationRequest(prompt, self.max_new_tokens)


def setup(runs: Runs, asked: Asked, command: str) -> Setup:
    """The checked experiment on `runs`. Raises InputError; TrunkError if the trunk cannot be asked what it serves."""
    flags = runs.flags(asked.flags)
    return Setup(
        design=asked.design,
        plan=plan(asked.design, flags, _about(flags.names(), asked.flags)),
        flags=flags,
        prompts=asked.prompts or (runs.config.generation.prompt,),
        max_new_tokens=asked.max_new_tokens,
        delta=asked.delta,
        pairs=asked.pairs,
        max_pairs=asked.pairs or MAX_PAIRS,
        minutes=None if asked.pairs else asked.minutes,
        seed=asked.seed,
        model=runs.files.name,
        command=command,
        environment=fingerprint(runs),
    )


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt in each line that is not empty. Raises InputError for a file that cannot be read or has none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("prompts", str(path), f"a readable text file ({error})") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not 1 <= len(prompts) <= PROMPTS_LIMIT:
        raise InputError("prompts", f"{path} with {len(prompts)} prompts", f"1 to {PROMPTS_LIMIT} prompts, one a line")
    return prompts


def _about(applied: Sequence[str], words: str) -> list[str]:
    """The flags that are asked about: all that are applied, in the order in which the words name them, if they do."""
    written = [word.partition("=")[0] for word in re.split(r"[\s,:]+", words)]
    return sorted(applied, key=lambda name: written.index(name) if name in written else len(written))
