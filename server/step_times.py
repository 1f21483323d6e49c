"""How long this server's layers take for a token and for a prompt, by the forwards that it has computed."""

from collections import deque

RECENT = 64
"""Forwards that are looked at."""
PROMPT_TOKENS = 16
"""The fewest tokens of a forward that tells how long each of a prompt takes."""


class StepTimes:
    """The least times of recent forwards with one step: others can only make one slower. Zero before the first."""

    def __init__(self) -> None:
        self._decode = deque[float](maxlen=RECENT)
        self._prompts = deque[tuple[int, float]](maxlen=RECENT)

    def note(self, steps: int, tokens: int, seconds: float) -> None:
        """Note a forward."""
        if steps == 1 and tokens == 1:
            self._decode.append(seconds)
        elif steps == 1 and tokens >= PROMPT_TOKENS:
            self._prompts.append((tokens, seconds))

    @property
    def decode_s(self) -> float:
        """Seconds of one token."""
        return min(tuple(self._decode), default=0.0)

    @property
    def prefill_s(self) -> float:
        """Seconds of each token of a prompt after the first."""
        decode_s, prompts = self.decode_s, tuple(self._prompts)
        each = (max(0.0, seconds - decode_s) / (tokens - 1) for tokens, seconds in prompts) if decode_s else ()
        return min(each, default=0.0)
