"""What the loaded stage is asked before it serves: can sessions share a forward, and how many prompt tokens may?"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from splitlearn.flags import settings
from splitlearn.kv import KVPool, PooledCache, Run, shapes_of
from splitlearn.stages import LocalSession, LocalStage, StageInput

# A forward with a piece of a prompt takes at most this many times what one of a single token takes.
PROMPT_SHARE = 1.8
LEAST_PROMPT_TOKENS, MOST_PROMPT_TOKENS = 16, 4096


@dataclass(frozen=True)
class Trial:
    """A stage, with the flags of the sessions that it is tried with."""

    stage: LocalStage
    applied: frozenset[str]
    hidden_size: int
    dtype: torch.dtype

    def packs(self) -> bool:
        """Whether the layers give in one packed forward what they give apart, but for rounding.

        A family whose attention does not go through transformers' interface, or that does more with keys and values
        than keep them, shows it here, and is served one session a forward. So is a compiled stage, which would be
        compiled anew for each mix of sessions.
        """
        if settings(self.applied).compile_module is not None:
            return False
        lengths, ends = [3, 2], [1, 2]  # prompts from their beginnings; then one token, and a piece of a prompt
        x = 0.1 * torch.randn(1, 8, self.hidden_size, generator=torch.Generator().manual_seed(0)).to(self.dtype)
        prompts, last = torch.split(x[:, :5], lengths, dim=1), torch.split(x[:, 5:], ends, dim=1)
        sessions = self._sessions(4)
        apart = [
            self._step([sessions[at]], [position], [part])
            for positions, parts in (([0, 0], prompts), (lengths, last))
            for at, (position, part) in enumerate(zip(positions, parts, strict=True))
        ]
        try:
            packed = [
                self._step(sessions[2:], positions, parts) for positions, parts in (([0, 0], prompts), (lengths, last))
            ]
        except Exception:
            return False
        close = float(torch.finfo(self.dtype).eps ** 0.5)
        return all(
            torch.allclose(a, b, rtol=close, atol=close * float(a.abs().max()))
            for a, b in zip(chain(*apart), chain(*packed), strict=True)
        )

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

    def _sessions(self, count: int) -> list[LocalSession]:
        """Sessions of at most 4 tokens in a pool of their own."""
        device = self.stage.device
        pool = KVPool(shapes_of(self.stage.cut, self.hidden_size, self.dtype, device), 4 * count, 4, self.dtype, device)
        return [LocalSession(PooledCache(pool, Run(4 * at, 4)), settings(self.applied), 4) for at in range(count)]

    def _step(
        self, sessions: Sequence[LocalSession], positions: Sequence[int], parts: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        batch = [StageInput(*each) for each in zip(sessions, positions, parts, strict=True)]
        return [output.x for output in self.stage.step(batch)]

    def _seconds(self, tokens: int) -> float:
        """Seconds of a step of `tokens`, the best of three."""
        x = torch.zeros(1, tokens, self.hidden_size, dtype=self.dtype)
        best = float("inf")
        for _ in range(3):
            session = self.stage.open(self.applied, tokens)
            started = time.perf_counter()
            self.stage.step([StageInput(session, 0, x)])
            best = min(best, time.perf_counter() - started)
        return best
