"""Which part of a model a process has: the trunk's layers, or those of a client with what only a client needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """The layers `[start, end)` of each range; with `ends` also the embeddings, the final norm and the LM head."""

    layers: tuple[tuple[int, int], ...]
    ends: bool = False

    @classmethod
    def read(cls, written: Mapping[str, Any]) -> "Part":
        """The part that a manifest names. Raises ValueError, TypeError or KeyError for what is none."""
        found = cls(tuple((start, end) for start, end in written["layers"]), written["ends"])
        if type(found.ends) is not bool or not all(0 <= start < end for start, end in found.layers):
            raise ValueError(f"{written} is no part of a model")
        return found

    def has(self, start: int, end: int, ends: bool) -> bool:
        """Whether the layers `[start, end)` are in it, and the embeddings and the LM head if `ends` asks for them."""
        inside = start == end or any(first <= start and end <= last for first, last in self.layers)
        return inside and self.ends >= ends

    def __str__(self) -> str:
        named = " and ".join(f"[{start}, {end})" for start, end in self.layers)
        return f"the layers {named}{', the embeddings and the LM head' if self.ends else ''}"
