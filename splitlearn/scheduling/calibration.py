"""Calibration at the start: measures how long a forward may wait for steps, and how many tokens of prompts it takes."""

import time

from splitlearn.models.cut import example
from splitlearn.scheduling.scheduler import WHOLE, Limits
from splitlearn.stages.base import StageInput
from splitlearn.stages.head import Head
from splitlearn.stages.local import LocalStage
from splitlearn.stages.settings import SessionSettings

# A forward with a chunk of a prompt takes at most this many times as long as one of a single token.
PROMPT_RATIO = 1.8
MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS = 16, 4096


def calibrate(stage: LocalStage, settings: SessionSettings, prompt_tokens: int | None) -> Limits:
    """The limits of a forward of `stage` for sessions with `settings`. `prompt_tokens` None is measured.

    A forward waits at most as long as a forward of one token takes. Without that wait, sessions that miss each other
    keep alternating in two forwards that both read all weights, which costs more.
    """
    shared = stage.packs(settings)
    # A compiled stage would be compiled again for each length of a chunk.
    tokens = WHOLE if stage.cut.compiled else prompt_tokens or _prompt_tokens(stage, settings)
    return Limits(shared, _seconds(stage, settings, 1) if shared else 0.0, tokens)


def calibrate_head(head: Head, settings: SessionSettings) -> Limits:
    """The limits of a product of an LM head, which takes all rows that wait."""
    return Limits(shared=False, gather_s=_seconds(head, settings, 1), prompt_tokens=WHOLE)


def _prompt_tokens(stage: LocalStage, settings: SessionSettings) -> int:
    """The largest power of two whose step takes at most PROMPT_RATIO times as long as a step of one token.

    At least MIN_PROMPT_TOKENS: with fewer, measured on a busy machine, prompts would hardly advance.
    """
    one, tokens = _seconds(stage, settings, 1), MIN_PROMPT_TOKENS
    while tokens < MAX_PROMPT_TOKENS and _seconds(stage, settings, 2 * tokens) <= PROMPT_RATIO * one:
        tokens *= 2
    return tokens


def _seconds(stage: LocalStage | Head, settings: SessionSettings, tokens: int) -> float:
    """The seconds that a step of `tokens` takes, the best of three."""
    x = example(stage.cut, tokens)
    best = float("inf")
    for _ in range(3):
        session = stage.open(settings, tokens)
        started = time.perf_counter()
        stage.compute([StageInput(session, 0, x)])
        best = min(best, time.perf_counter() - started)
    return best
