"""Which part of a model a process has: the trunk's layers, or those of a client with what only a client needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from splitlearn.models.plan import SplitPlan


@dataclass(frozen=True)
class Part:
    """The layers `[start, end)` of each range; with `ends` also the embeddings, the final norm and the LM head."""

    layers: tuple[tuple[int, int], ...]
    ends: bool = False

    @classmethod
    def of_trunk(cls, plan: SplitPlan) -> "Part":
        """What a trunk server has."""
        return cls(((plan.start, plan.end),))

    @classmethod
    def of_client(cls, plan: SplitPlan) -> "Part":
        """What a client has, whose trunk is at a server."""
        ranges = ((0, plan.start), (plan.end, plan.n_layers))
        return cls(tuple((start, end) for start, end in ranges if start < end), ends=True)

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

    def covers(self, other: "Part") -> bool:
        """Whether all of `other` is in it."""
        return all(self.has(start, end, other.ends) for start, end in other.layers or ((0, 0),))

    @property
    def slug(self) -> str:
        """It as a part of a folder's name."""
        return "+".join([*(f"{start}-{end}" for start, end in self.layers), *(["ends"] if self.ends else [])])

    def __str__(self) -> str:
        named = " and ".join(f"[{start}, {end})" for start, end in self.layers)
        ends = ["the embeddings and the LM head"] if self.ends else []
        return ", ".join([*([f"the layers {named}"] if named else []), *ends])
