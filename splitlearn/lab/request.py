"""Turns a user's request into a checked `Setup`, for the command line and the page."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from splitlearn.errors import InputError
from splitlearn.events import GenerationRequest
from splitlearn.flags.selection import FlagSet, check
from splitlearn.lab.design import DESIGNS, Design, Plan, plan
from splitlearn.lab.records import Setup

if TYPE_CHECKING:
    from splitlearn.arms.runs import Runs

DELTA = 0.02
MAX_PAIRS = 72
MINUTES = 60.0
TOGETHER = "all"
PROMPTS_LIMIT = 1000


@dataclass(frozen=True)
class ExperimentRequest:
    """A user's request for an experiment.

    With `pairs` None it goes on until everything is decided or `minutes` are over; a number of pairs has no time limit.
    `about` names the applied flags to ask about, and TOGETHER all of them together; nothing is all of that.
    Raises InputError for invalid flags, a number out of range or an empty prompt.
    """

    flags: str
    design: Design = "without"
    pairs: int | None = None
    minutes: float | None = MINUTES
    delta: float = DELTA
    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 64
    seed: int = 0
    about: tuple[str, ...] = ()

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


def setup(runs: "Runs", request: ExperimentRequest, command: str) -> Setup:
    """The checked experiment on `runs`. Raises InputError, and TrunkError if the trunk does not answer."""
    from splitlearn.lab.environment import fingerprint  # gRPC: slow to import, and not needed to refuse a number

    flags = runs.flags(request.flags)
    return Setup(
        design=request.design,
        plan=planned(request, flags),
        flags=flags,
        prompts=request.prompts or (runs.config.generation.prompt,),
        max_new_tokens=request.max_new_tokens,
        delta=request.delta,
        pairs=request.pairs,
        max_pairs=request.pairs or MAX_PAIRS,
        minutes=None if request.pairs else request.minutes,
        seed=request.seed,
        model=runs.files.name,
        command=command,
        environment=fingerprint(runs),
    )


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a file, one a line. Raises InputError for an unreadable file or one without prompts."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("prompts", str(path), f"a readable text file ({error})") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not 1 <= len(prompts) <= PROMPTS_LIMIT:
        raise InputError("prompts", f"{path} with {len(prompts)} prompts", f"1 to {PROMPTS_LIMIT} prompts, one a line")
    return prompts


def planned(request: ExperimentRequest, flags: FlagSet) -> Plan:
    """The arms and questions. Raises InputError for a question about a flag that is not applied."""
    applied, asked = flags.names(), list(dict.fromkeys(request.about))
    if not asked:
        return plan(request.design, flags, _all(applied, request.flags))
    for name in asked:
        if name not in (*applied, TOGETHER):
            raise InputError("about", name, f"{TOGETHER}, or a flag that is applied: {', '.join(applied) or 'none is'}")
    names = [name for name in asked if name != TOGETHER]
    if not names and (len(applied) < 2 or request.design == "ladder"):
        raise InputError("about", TOGETHER, "flags by name: it takes several flags, and no ladder, to ask about all")
    return plan(request.design, flags, names, together=TOGETHER in asked)


def _all(applied: Sequence[str], words: str) -> list[str]:
    """All applied flags, in the order in which the words name them."""
    written = [word.partition("=")[0] for word in re.split(r"[\s,:]+", words)]
    return sorted(applied, key=lambda name: written.index(name) if name in written else len(written))
