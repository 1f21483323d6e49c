"""Steps of any length on shapes that are few: rows are padded to a power of two, within the memory of a session."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Neighbouring rows of a step: `rows` from row `at` on, padded to `padded`. The step asks for the outputs of the
    last `wanted` of them."""

    at: int
    rows: int
    padded: int
    wanted: int


def power_of_two(count: int) -> int:
    """The least power of two that is not below `count`."""
    return 1 << max(0, count - 1).bit_length()


def pieces(position: int, rows: int, capacity: int, wanted: int) -> Iterator[Piece]:
    """A step of `rows` as pieces whose padding stays within the capacity, most often one. It asks for the outputs of
    its last `wanted` rows."""
    at = 0
    while at < rows:
        padded = power_of_two(rows - at)
        while position + at + padded > capacity:
            padded //= 2
        own = min(padded, rows - at)
        yield Piece(at, own, padded, max(0, min(own, at + own - (rows - wanted))))
        at += own
