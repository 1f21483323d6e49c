"""Hidden states to messages and back; dtype, shape and bytes are checked against each other."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from splitlearn.errors import InputError
from splitlearn.wire import MAX_TENSOR_BYTES
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.hidden_states import Rows

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fields(data: bytes, rows: Rows, hidden_size: int) -> dict[str, Any]:
    """Rows of a hidden state [1, T, hidden_size] as the fields of a Tensor message.

    Fields, not a Tensor: that would be copied into the message around it.
    """
    shape = (1, len(data) // rows.row_bytes(hidden_size), hidden_size)
    return {"dtype": rows.number, "shape": shape, "data": data}


def check(received: pb.Tensor, rows: Rows, hidden_size: int) -> int:
    """Return the number of tokens T in `received`, which must hold [1, T, hidden_size] in the form of `rows`.

    Raises InputError that names what differs. Allocates nothing.
    """
    if received.dtype != rows.number:
        raise InputError("tensor.dtype", dtype_name(received.dtype), dtype_name(rows.number))
    shape = list(received.shape[:9])  # a message may hold millions of numbers
    if len(shape) != 3 or shape[0] != 1 or shape[1] < 1 or shape[2] != hidden_size:
        raise InputError("tensor.shape", shape, f"[1, tokens, {hidden_size}] with at least one token")
    size = shape[1] * rows.row_bytes(hidden_size)
    if len(received.data) != size:
        raise InputError("tensor.data", f"{len(received.data)} bytes", f"{size} bytes for shape {shape}")
    return int(shape[1])


def dtype_name(number: int) -> str:
    """A wire dtype's name in lower case, or its number if it has none."""
    return pb.Dtype.Name(number).lower() if number in pb.Dtype.values() else str(number)


def check_finite(x: torch.Tensor, position: int) -> None:
    """Raise InputError for a NaN or an Inf in `x` [1, T, H], whose first row is at `position`. It names where."""
    if (found := where_not_finite(x)) is not None:
        row, value = found
        raise InputError("tensor.data", f"{value} at position {position + row}", "finite numbers")


def where_not_finite(x: torch.Tensor) -> tuple[int, float] | None:
    """The first row of `x` [1, T, H] with a NaN or an Inf, and that value; None if all values are finite.

    A sum is finite only if every value is. It takes 3 us for a row of 576; isfinite().all() takes 20. A sum of finite
    values may overflow, so the values are then checked one by one.
    """
    if math.isfinite(x.sum().item()):
        return None
    places = (~x[0].isfinite()).nonzero()
    if not len(places):
        return None
    row, column = places[0].tolist()
    return row, float(x[0, row, column])


def in_parts(data: bytes, rows: Rows, hidden_size: int, position: int, limit: int = 0) -> Iterator[dict[str, Any]]:
    """The fields of the messages that take the rows of a hidden state, the first of which is at `position`; `limit` is
    that of `part_bytes`."""
    row = rows.row_bytes(hidden_size)
    size = part_bytes(row, limit)
    for start in range(0, len(data), size):
        hidden, more = fields(data[start : start + size], rows, hidden_size), start + size < len(data)
        yield {"position": position + start // row, "hidden": hidden, "more": more}


def part_bytes(row_bytes: int, limit: int = 0) -> int:
    """Bytes of a hidden state that go into one message: whole rows of `row_bytes`.

    `limit` is the most bytes that the other end accepts, 0 if unknown. Only long prompts need several messages.
    """
    return max(1, min(limit or MAX_TENSOR_BYTES, MAX_TENSOR_BYTES) // row_bytes) * row_bytes
