"""What a client may do to the hidden states that it sends, so that they are harder to read. Neither makes them private:
docs/privacy.md has what is read all the same.

A row x is sent as mean(x) + deviation(x) * draw, where the draw is Gaussian. It follows from the seed of the request
and the tokens up to the row. So a row that is sent again has the same draw, which cannot be averaged out, and another
token at the same position, as after a wrong draft, has another one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from splitlearn.wire.hidden_states import converted

MEDIAN_OF_NORMAL = 0.6745
"""The median magnitude of a normal distribution with standard deviation 1."""


class Defence(Protocol):
    """One way to change rows x [T, H] in float32 before they are sent. An attacker may know it."""

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H]: what is sent, but for what is added at random."""

    def deviation(self, x: torch.Tensor) -> torch.Tensor | None:
        """[T, 1]: the standard deviation of what is added to each value of a row. None for nothing."""


@dataclass(frozen=True)
class GaussianNoise:
    """Adds noise. Its standard deviation is `share` of the row's own, which is taken from the row's median magnitude: a
    few values of some rows are thousands of times larger than the others, and would set the root mean square alone."""

    share: float

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def deviation(self, x: torch.Tensor) -> torch.Tensor:
        return self.share / MEDIAN_OF_NORMAL * x.abs().median(dim=-1, keepdim=True).values


@dataclass(frozen=True)
class TopK:
    """Keeps the `share` of each row's values with the largest magnitude. The others are sent as zeros."""

    share: float

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        kept = x.abs().topk(max(1, round(self.share * x.shape[-1])), dim=-1).indices
        return torch.zeros_like(x).scatter(-1, kept, x.gather(-1, kept))

    def deviation(self, x: torch.Tensor) -> torch.Tensor | None:
        return None


@dataclass
class Defended:
    """The `defences` of one sample's hidden states, one behind the other, and a key for the draw of each position."""

    defences: Sequence[Defence]
    seed: int
    keys: list[bytes] = field(default_factory=list)

    def feed(self, position: int, ids: Sequence[int]) -> None:
        """Note the token ids from `position` on. Those behind them are forgotten."""
        del self.keys[position:]
        for token in ids:
            before = self.keys[-1] if self.keys else b""
            link = blake2b(before + token.to_bytes(8), digest_size=16, key=self.seed.to_bytes(8))
            self.keys.append(link.digest())

    def fork(self, other: "Defended", tokens: int) -> None:
        """Go on behind the first `tokens` of `other`."""
        self.keys = other.keys[:tokens]

    def sent(self, x: torch.Tensor, end: int) -> torch.Tensor:
        """What is sent of `x` [1, T, H], the states of the T positions before `end`."""
        rows = x[0].float()
        for defence in self.defences:
            deviation, rows = defence.deviation(rows), defence.mean(rows)
            if deviation is not None:
                draws = np.stack([_draw(key, x.shape[2]) for key in self.keys[end - len(rows) : end]])
                rows = rows + deviation * torch.from_numpy(draws).to(rows.device)
        return converted(rows.unsqueeze(0), x.dtype)


def _draw(key: bytes, size: int) -> NDArray[np.float32]:
    """`size` values of a normal distribution."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key))).standard_normal(size, dtype=np.float32)
