"""Tensors as bytes and back: dtype, shape and raw little-endian values, checked against each other."""

import math

import torch

from splitlearn.errors import InputError
from splitlearn.wire import MAX_TENSOR_BYTES
from splitlearn.wire import trunk_pb2 as pb

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TO_WIRE = {torch.float32: pb.FLOAT32, torch.bfloat16: pb.BFLOAT16, torch.float16: pb.FLOAT16}
_FROM_WIRE = {number: dtype for dtype, number in _TO_WIRE.items()}


def encode(x: torch.Tensor) -> pb.Tensor:
    """`x` [1, T, H], of a dtype in DTYPES, as a message. Raises InputError for another dtype."""
    if x.dtype not in _TO_WIRE:
        raise InputError("tensor.dtype", str(x.dtype), f"one of: {', '.join(DTYPES)}")
    return message(to_bytes(x), x.dtype, x.shape[2])


def message(data: bytes, dtype: torch.dtype, hidden_size: int) -> pb.Tensor:
    """The raw values of a hidden state [1, T, hidden_size] as a message."""
    shape = (1, len(data) // (hidden_size * dtype.itemsize), hidden_size)
    return pb.Tensor(dtype=_TO_WIRE[dtype], shape=shape, data=data)


def to_bytes(x: torch.Tensor) -> bytes:
    """The values of `x`, of any dtype and device, row by row."""
    return x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def check(received: pb.Tensor, dtype: torch.dtype, hidden_size: int) -> int:
    """The number of tokens T in `received`, which must hold [1, T, hidden_size] of `dtype`.

    Raises InputError that names what differs, before anything is allocated.
    """
    if _FROM_WIRE.get(received.dtype) != dtype:
        raise InputError("tensor.dtype", dtype_name(received.dtype), str(dtype).removeprefix("torch."))
    shape = list(received.shape[:9])  # a message may hold millions of them
    if len(shape) != 3 or shape[0] != 1 or shape[1] < 1 or shape[2] != hidden_size:
        raise InputError("tensor.shape", shape, f"[1, tokens, {hidden_size}] with at least one token")
    size = math.prod(shape) * dtype.itemsize
    if len(received.data) != size:
        raise InputError("tensor.data", f"{len(received.data)} bytes", f"{size} bytes for shape {shape}")
    return int(shape[1])


def dtype_name(number: int) -> str:
    """A wire dtype's name in lower case, or its number when it has none."""
    return pb.Dtype.Name(number).lower() if number in pb.Dtype.values() else str(number)


def from_bytes(data: bytes, dtype: torch.dtype, hidden_size: int) -> torch.Tensor:
    """[1, T, hidden_size] of `dtype` from checked bytes, in memory of torch's own.

    Bytes begin anywhere, and a float32 product rounds differently on memory that is not aligned as torch's is.
    """
    return torch.frombuffer(bytearray(data), dtype=dtype).view(1, -1, hidden_size).clone()


def check_finite(x: torch.Tensor, position: int) -> None:
    """Raise InputError that names the first of the positions `position`, ... of `x` [1, T, H] with a NaN or an Inf."""
    if (found := where_not_finite(x)) is not None:
        row, value = found
        raise InputError("tensor.data", f"{value} at position {position + row}", "finite numbers")


def where_not_finite(x: torch.Tensor) -> tuple[int, float] | None:
    """The first row of `x` [1, T, H] that holds a NaN or an Inf, and which of them; None when all are finite.

    A sum takes 3 us for a row of 576, where isfinite().all() takes 20, and it is finite only if all of it is. (That of
    finite numbers may overflow: only then are they looked at one by one.)
    """
    if math.isfinite(x.sum().item()):
        return None
    places = (~x[0].isfinite()).nonzero()
    if not len(places):
        return None
    row, column = places[0].tolist()
    return row, float(x[0, row, column])


def part_bytes(row_bytes: int, limit: int = 0) -> int:
    """How many bytes of a hidden state with rows of `row_bytes` go into one message: whole rows, all but long prompts'.

    `limit` is the most bytes that the other end takes, 0 where it does not say.
    """
    return max(1, min(limit or MAX_TENSOR_BYTES, MAX_TENSOR_BYTES) // row_bytes) * row_bytes
