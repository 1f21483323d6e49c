"""Ridge regression from hidden states to embeddings, in closed form."""

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-4
"""The penalty, relative to the mean square of a standardised state's value."""


@dataclass(frozen=True)
class LinearMap:
    """Maps a state x [H] to (x - mean) / scale @ weights + offset [E]."""

    mean: Tensor
    scale: Tensor
    weights: Tensor
    offset: Tensor

    @classmethod
    def fit(cls, x: Tensor, y: Tensor) -> "LinearMap":
        """The map from states `x` [N, H] to embeddings `y` [N, E] with the least square error and penalty.

        In float64: the states of some layers have a few values that are thousands of times larger than the others.
        """
        x, y = x.double(), y.double()
        mean, offset = x.mean(0), y.mean(0)
        scale = x.std(0).clamp_min(1e-6 * float(x.std()) + 1e-12)
        standard = (x - mean) / scale
        square = standard.T @ standard + RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        weights = torch.linalg.solve(square, standard.T @ (y - offset))
        return cls(mean.float(), scale.float(), weights.float(), offset.float())

    def __call__(self, x: Tensor) -> Tensor:
        """The embeddings [N, E] of states [N, H]."""
        return self.change(x - self.mean) + self.offset

    def change(self, difference: Tensor) -> Tensor:
        """By how much the embedding differs [N, E] where the state differs so [N, H]."""
        return difference / self.scale @ self.weights
