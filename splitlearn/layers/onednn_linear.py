"""Linear layers whose weights lie in memory as oneDNN's matrix product reads them.

torch's own float32 product reorders nothing: MKL reads a plain matrix, for one row on one thread and at 12 to 17 GB/s.
With the weights in oneDNN's blocked layout a row takes 0.45 (one thread) or 0.3 (two) times as long, and 16 to 512 rows
0.3 to 0.45 times (shapes of SmolLM2-135M, AMD EPYC with AVX-512, two cores). The sums are the same, added in another
order.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import nn

from splitlearn.runtime import private_apis

OP = "prepacked_linear"
_linear = private_apis.mkldnn_linear()
_library = torch.library.Library("splitlearn", "DEF")  # type: ignore[no-untyped-call]
_library.define(f"{OP}(Tensor x, Tensor packed, Tensor? bias) -> Tensor")  # type: ignore[no-untyped-call]


def _product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out: torch.Tensor = _linear(x, packed, bias, "none", [], "")
    return out


def _shape_of_product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


for _backend in ("CPU", "MkldnnCPU"):
    _library.impl(OP, _product, _backend)  # type: ignore[no-untyped-call]
torch.library.register_fake(f"splitlearn::{OP}", _shape_of_product, lib=_library)


def why_not(dtype: str) -> str | None:
    """Why weights of `dtype` cannot be packed on this machine, or None."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "needs a torch that was built with oneDNN"
    return None if private_apis.mkldnn_supports(dtype) else f"this processor has no products of {dtype}"


def each_packed(shapes: Sequence[tuple[int, int]]) -> type["PrepackedLinear"]:
    """Makes layers with weights of any shapes, each in memory of its own."""
    return PrepackedLinear


class PrepackedLinear(nn.Module):
    """`x @ weight.T + bias` for x [..., in]; `pieces` are the rows of `weight` [out, in], some at a time.

    They are taken over packed, in their own dtype, each before the next is asked for: a large weight need not be in
    memory twice.
    """

    def __init__(self, pieces: Iterable[torch.Tensor], bias: torch.Tensor | None) -> None:
        super().__init__()
        self._packed: list[torch.Tensor] = [private_apis.mkldnn_packed(piece) for piece in pieces]
        sizes = [len(packed) for packed in self._packed]
        self.out_features, self.in_features = sum(sizes), self._packed[0].shape[1]
        self.bias = bias
        self._biases = [None] * len(sizes) if bias is None else list(torch.split(bias, sizes))

    """How the weights are kept, as `LocalStage.describe` says it."""

    @property
    def weight(self) -> torch.Tensor:
        """The plain matrix [out, in], made anew: for models that look at their layers' weights."""
        return torch.cat([packed.to_dense() for packed in self._packed])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        return self._of_pieces(slice(None), x)

    def parts(self, share: float) -> tuple[Callable[[torch.Tensor], torch.Tensor], ...] | None:
        """What gives the first outputs, at least that share of all, and the others; None where all are one piece."""
        ends = accumulate(len(packed) for packed in self._packed)
        at = next(number for number, end in enumerate(ends, 1) if end >= share * self.out_features)
        pieces = (slice(at), slice(at, None))
        return tuple(partial(self._of_pieces, each) for each in pieces) if at < len(self._packed) else None

    def _of_pieces(self, some: slice, x: torch.Tensor) -> torch.Tensor:
        # inductor knows oneDNN's own operator only for weights that it packed itself
        product = torch.ops.splitlearn.prepacked_linear if torch.compiler.is_compiling() else _product
        outs = [product(x, packed, bias) for packed, bias in zip(self._packed[some], self._biases[some], strict=True)]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
