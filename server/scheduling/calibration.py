"""What the loaded stage is asked before it serves: how long may a forward wait, how many prompt tokens may it have?"""

import time
from dataclasses import dataclass

import torch

from splitlearn.stages.base import StageInput
from splitlearn.stages.local import LocalStage
from splitlearn.stages.settings import SessionSettings

# A forward with a piece of a prompt takes at most this many times what one of a single token takes.
PROMPT_SHARE = 1.8
LEAST_PROMPT_TOKENS, MOST_PROMPT_TOKENS = 16, 4096


@dataclass(frozen=True)
class Trial:
    """A stage, with the settings of the sessions that it is tried with."""

    stage: LocalStage
    settings: SessionSettings

    def gather_s(self) -> float:
        """How long a forward should wait for sessions that are about to bring their next step.

        Sessions that miss each other go on missing each other, in two forwards by turns that both read all weights. To
        wait costs less than that, as long as it takes less than a forward of one token.
        """
        return self._seconds(1)

    def prompt_tokens(self) -> int:
        """How many tokens of prompts a forward may take while others decode: measured, as it depends on the machine.

        The largest power of two whose step takes at most PROMPT_SHARE times as long as a step of one token, and at
        least LEAST_PROMPT_TOKENS: on a machine that was busy at the start, prompts would never be done.
        """
        one, tokens = self._seconds(1), LEAST_PROMPT_TOKENS
        while tokens < MOST_PROMPT_TOKENS and self._seconds(2 * tokens) <= PROMPT_SHARE * one:
            tokens *= 2
        return tokens

    def _seconds(self, tokens: int) -> float:
        """Seconds of a step of `tokens`, the best of three."""
        x = torch.zeros(1, tokens, self.stage.hidden_size, dtype=self.stage.dtype)
        best = float("inf")
        for _ in range(3):
            session = self.stage.open(self.settings, tokens)
            started = time.perf_counter()
            self.stage.compute([StageInput(session, 0, x)])
            best = min(best, time.perf_counter() - started)
        return best
