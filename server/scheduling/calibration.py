"""Calibration at the start: how long a forward may wait for steps, and how many tokens of prompts it may take."""

import time

import torch

from server.scheduling.scheduler import WHOLE, Limits
from splitlearn.stages.base import StageInput
from splitlearn.stages.local import LocalStage
from splitlearn.stages.settings import SessionSettings

# A forward with a piece of a prompt takes at most so many times as long as one of a single token.
PROMPT_SHARE = 1.8
LEAST_PROMPT_TOKENS, MOST_PROMPT_TOKENS = 16, 4096


def calibrate(stage: LocalStage, settings: SessionSettings, prompt_tokens: int | None) -> Limits:
    """The limits of a forward of `stage`, for sessions with `settings`; `prompt_tokens` as configured, or measured.

    A forward may wait for as long as one of a single token takes. Sessions that miss each other go on missing each
    other, in two forwards by turns that both read all weights; to wait costs less than that.
    """
    shared = stage.packs(settings)
    # Each length of a piece would compile a compiled stage again.
    tokens = WHOLE if stage.cut.compiled else prompt_tokens or _prompt_tokens(stage, settings)
    return Limits(shared, _seconds(stage, settings, 1) if shared else 0.0, tokens)


def _prompt_tokens(stage: LocalStage, settings: SessionSettings) -> int:
    """The largest power of two whose step takes at most PROMPT_SHARE times as long as a step of one token.

    At least LEAST_PROMPT_TOKENS: on a machine that was busy at the start, prompts would never be done.
    """
    one, tokens = _seconds(stage, settings, 1), LEAST_PROMPT_TOKENS
    while tokens < MOST_PROMPT_TOKENS and _seconds(stage, settings, 2 * tokens) <= PROMPT_SHARE * one:
        tokens *= 2
    return tokens


def _seconds(stage: LocalStage, settings: SessionSettings, tokens: int) -> float:
    """Seconds of a step of `tokens`, the best of three."""
    x = torch.zeros(1, tokens, stage.hidden_size, dtype=stage.dtype)
    best = float("inf")
    for _ in range(3):
        session = stage.open(settings, tokens)
        started = time.perf_counter()
        stage.compute([StageInput(session, 0, x)])
        best = min(best, time.perf_counter() - started)
    return best
