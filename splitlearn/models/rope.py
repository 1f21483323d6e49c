"""Rotary embeddings whose frequencies change with the length of the sequence: rope types `dynamic` and `longrope`.

transformers' modules take that length from the largest position of a forward, and `dynamic` ones remember it for the
next. So a piece of a prompt, or a step packed with another session's, would get frequencies of another sequence. Here
they are a pure function: the token at position p has those of a sequence of max(rope_length, p + 1) tokens, where
`rope_length` is one number that comes with each step. With the length of the prompt for it these are the frequencies
of transformers' own generate(), which feeds the prompt in one forward and each later token in one of its own.

    make_pure(model)                        # once, after which its modules keep nothing
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
"""Neighbouring tokens of one sequence in a forward: their `rope_length`, 0 for the length that they end at, and their
number."""
_parts: ContextVar[Sequence[Part]] = ContextVar("parts of the forward under way", default=())


def make_pure(model: nn.Module) -> None:
    """Put a `PureRotary` in the place of each module of `model` whose frequencies change with the length."""
    made: dict[int, PureRotary] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if _grows(module):
            model.set_submodule(path, made.setdefault(id(module), PureRotary(module)))


def is_pure(model: nn.Module) -> bool:
    """Whether `model` has a module of such frequencies, which `make_pure` has replaced."""
    return any(isinstance(module, PureRotary) for module in model.modules())


@contextmanager
def computing(parts: Sequence[Part]) -> Iterator[None]:
    """Inside, a forward has the tokens of `parts`, one part behind the other."""
    token = _parts.set(parts)
    try:
        yield
    finally:
        _parts.reset(token)


class PureRotary(nn.Module):
    """Calls transformers' module once for each length that a forward's tokens have, always as if it were new."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own: Any = own

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """What `own` gives for positions [..., T]: tensors [..., T, size], most often cos and sin."""
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
        """The least lengths that have the same frequencies as `lengths`."""
        if rope_type == "dynamic":
            return lengths.clamp(min=self.own.original_max_seq_len)
        parameters = self.own.config.rope_parameters
        own = parameters if layer_type is None else parameters[layer_type]
        original: int = own["original_max_position_embeddings"]
        return original + (lengths > original).long()

    def _as_new(
        self, x: Tensor, position_ids: Tensor, length: int, layer_type: str | None, call: dict[str, str]
    ) -> Any:
        """What `own` gives in a forward of a sequence of `length` tokens. It looks at the largest position, so that of
        the last token goes in, too, and does not come out."""
        prefix = "" if layer_type is None else f"{layer_type}_"
        setattr(self.own, f"{prefix}max_seq_len_cached", self.own.original_max_seq_len)
        # Into the buffer's own memory: `longrope` writes into the buffer, and must not write into the original.
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
    """For each token of the forward under way the length [T] of its sequence."""
    ends = position_ids.reshape(-1, position_ids.shape[-1]).amax(0) + 1
    parts = _parts.get() or [(0, len(ends))]
    split = torch.split(ends, [tokens for _, tokens in parts])
    return torch.cat([own.clamp(min=length or int(own.max())) for own, (length, _) in zip(split, parts, strict=True)])
