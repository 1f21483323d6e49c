"""Rotary embeddings whose frequencies change with the length of the sequence: rope types `dynamic` and `longrope`.

transformers' modules take that length from the largest position of a forward, and `dynamic` ones remember it for the
next. So a chunk of a prompt, or a step in a ragged batch, would get frequencies of another sequence.

Here the frequencies are a pure function. The token at position p gets those of a sequence of max(rope_length, p + 1)
tokens, where each step brings `rope_length`. If that is the length of the prompt, the frequencies are those of
transformers' own generate(), which feeds the prompt in one forward and each later token in one of its own.

    make_pure(model)                        # once; then its modules keep no state
    with computing([(rope_length, 5)]):     # a forward of 5 tokens
        model(...)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

GROWING = ("dynamic", "longrope")
"""Rope types whose frequencies change as the sequence grows."""

Part = tuple[int, int]
"""Neighbouring tokens of one sequence in a forward: their `rope_length` (0: the length that they end at) and their
number."""
_parts: ContextVar[Sequence[Part]] = ContextVar("parts of the forward under way", default=())


def make_pure(model: nn.Module) -> None:
    """Replace each module of `model` whose frequencies change with the length by a `PureRotary`."""
    made: dict[int, PureRotary] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if _grows(module):
            model.set_submodule(path, made.setdefault(id(module), PureRotary(module)))


def is_pure(model: nn.Module) -> bool:
    """Whether `make_pure` has replaced a module of `model`."""
    return any(isinstance(module, PureRotary) for module in model.modules())


@contextmanager
def computing(parts: Sequence[Part]) -> Iterator[None]:
    """Inside, a forward computes the tokens of `parts`, one part after the other."""
    token = _parts.set(parts)
    try:
        yield
    finally:
        _parts.reset(token)


class PureRotary(nn.Module):
    """Calls transformers' module once for each length among a forward's tokens, each time with fresh state."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own: Any = own

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """The result of `own` for positions [..., T]: tensors [..., T, size], most often cos and sin."""
        call = {} if layer_type is None else {"layer_type": layer_type}
        rope_type = self.own.rope_type if layer_type is None else self.own.rope_type[layer_type]
        if rope_type not in GROWING:
            return self.own(x, position_ids, **call)
        lengths = self._effective(_lengths(position_ids), rope_type, layer_type)
        order, found = [], []
        for length in sorted(set(lengths.tolist())):
            at = (lengths == length).nonzero()[:, 0]
            order.append(at)
            found.append(self._as_new(x, position_ids[..., at], length, layer_type, call))
        if len(found) == 1:
            return found[0]
        back = torch.cat(order).argsort()
        if isinstance(found[0], Tensor):
            return torch.cat(found, dim=-2)[..., back, :]
        return tuple(torch.cat(each, dim=-2)[..., back, :] for each in zip(*found, strict=True))

    def _effective(self, lengths: Tensor, rope_type: str, layer_type: str | None) -> Tensor:
        """The smallest lengths with the same frequencies as `lengths`."""
        if rope_type == "dynamic":
            return lengths.clamp(min=self.own.original_max_seq_len)
        parameters = self.own.config.rope_parameters
        own = parameters if layer_type is None else parameters[layer_type]
        original: int = own["original_max_position_embeddings"]
        return original + (lengths > original).long()

    def _as_new(
        self, x: Tensor, position_ids: Tensor, length: int, layer_type: str | None, call: dict[str, str]
    ) -> Any:
        """The result of `own` in a forward of a sequence of `length` tokens.

        `own` looks at the largest position, so the last token's is added, and its result is dropped.
        """
        prefix = "" if layer_type is None else f"{layer_type}_"
        setattr(self.own, f"{prefix}max_seq_len_cached", self.own.original_max_seq_len)
        # A clone: `longrope` writes into the buffer, and must not write into the original.
        setattr(self.own, f"{prefix}inv_freq", getattr(self.own, f"{prefix}original_inv_freq").clone())
        last = position_ids.new_full((*position_ids.shape[:-1], 1), length - 1)
        found = self.own(x, torch.cat([position_ids, last], dim=-1), **call)
        if isinstance(found, Tensor):
            return found[..., :-1, :]
        return tuple(each[..., :-1, :] for each in found)


def _grows(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    return not set(kinds.values() if isinstance(kinds, dict) else [kinds]).isdisjoint(GROWING)


def _lengths(position_ids: Tensor) -> Tensor:
    """The length [T] of each token's sequence, in the current forward."""
    ends = position_ids.reshape(-1, position_ids.shape[-1]).amax(0) + 1
    parts = _parts.get() or [(0, len(ends))]
    split = torch.split(ends, [tokens for _, tokens in parts])
    return torch.cat([own.clamp(min=length or int(own.max())) for own, (length, _) in zip(split, parts, strict=True)])
