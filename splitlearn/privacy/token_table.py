"""A table of one vector for each token of the vocabulary, and which of them is the closest to another vector."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

ALL = slice(None)


@dataclass(frozen=True)
class TokenTable:
    """Directions [V, H] of the tokens' vectors, after each dimension was given the mean 0 and the scale 1.

    Without that, a few dimensions with large values would decide alone.
    """

    mean: Tensor
    scale: Tensor
    directions: Tensor

    @classmethod
    def of(cls, vectors: Tensor) -> "TokenTable":
        """The table of `vectors` [V, H]."""
        mean, scale = vectors.mean(0), vectors.std(0)
        scale = scale.clamp_min(1e-6 * float(scale.max()) + 1e-12)
        return cls(mean, scale, normalize((vectors - mean) / scale))

    def likeness(self, x: Tensor, tokens: Tensor | slice = ALL) -> Tensor:
        """The cosine [N, V] between each of `x` [N, H] and each token's vector, or the vectors of some `tokens` [V]."""
        return normalize((x - self.mean) / self.scale) @ self.directions[tokens].T

    def closest(self, x: Tensor) -> list[int]:
        """The token whose vector is the closest, for each of `x` [N, H]."""
        found: list[int] = self.likeness(x).argmax(1).tolist()
        return found
