"""The forms of a hidden state's rows in a message: as computed, or in fewer bytes.

A session's flags choose the form, a `Rows` (`wire_dtype`). Both ends of the session use it, in both directions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from numpy.typing import NDArray

from splitlearn.wire import trunk_pb2 as pb

TO_WIRE = {torch.float32: pb.FLOAT32, torch.bfloat16: pb.BFLOAT16, torch.float16: pb.FLOAT16}
BLOCK = 64
"""Values that share a scale. With 64, a row of 576 values takes 0.26 of its float32 bytes."""
LARGEST = 127
Read = Callable[[bytes], torch.Tensor]
"""Turns checked bytes into a hidden state [1, T, hidden_size] on the CPU."""


class Rows(Protocol):
    """One form of a hidden state [1, T, H] in bytes, row by row."""

    @property
    def number(self) -> pb.Dtype:
        """The form's number in a message."""

    def row_bytes(self, hidden_size: int) -> int:
        """Bytes of one row of `hidden_size` values."""

    def to_bytes(self, x: torch.Tensor) -> bytes:
        """The rows of `x` [1, T, H], which may be on any device."""

    def from_bytes(self, data: bytes, hidden_size: int) -> torch.Tensor:
        """[1, T, hidden_size] on the CPU from checked bytes, in memory that torch allocated."""

    def reader(self, hidden_size: int) -> Read:
        """`from_bytes` for one session, whose caller is done with a result when it reads the next one."""


@dataclass(frozen=True)
class Plain:
    """Raw little-endian values of `dtype`."""

    dtype: torch.dtype

    @property
    def number(self) -> pb.Dtype:
        return TO_WIRE[self.dtype]

    def row_bytes(self, hidden_size: int) -> int:
        return hidden_size * self.dtype.itemsize

    def to_bytes(self, x: torch.Tensor) -> bytes:
        """The values in `dtype`."""
        return _raw(converted(x if x.is_cpu else x.cpu(), self.dtype))

    def from_bytes(self, data: bytes, hidden_size: int) -> torch.Tensor:
        """The values in `dtype`.

        Copied, since a float32 product rounds differently on memory that is not aligned as torch's is.
        """
        x = torch.empty(1, len(data) // self.row_bytes(hidden_size), hidden_size, dtype=self.dtype)
        _array(x).data.cast("B")[:] = data
        return x

    def reader(self, hidden_size: int) -> Read:
        """Reads single rows (decoded tokens) into one reused buffer.

        Allocating takes 40 us of 45 when that code is no longer in the processor's caches.
        """
        row = torch.empty(1, 1, hidden_size, dtype=self.dtype)
        memory = _array(row).data.cast("B")

        def read(data: bytes) -> torch.Tensor:
            if len(data) != len(memory):
                return self.from_bytes(data, hidden_size)
            memory[:] = data
            return row

        return read


@dataclass(frozen=True)
class Int8Blocks:
    """A row is bfloat16 scales, one for every BLOCK values, then an int8 for each value: value = int8 * scale.

    The scale is the largest magnitude of its block / 127, as in Dettmers et al. 2022, "8-bit Optimizers via Block-wise
    Quantization" (arXiv:2110.02861), here with a linear code. The error is at most 3/4 of a scale: half a scale from
    rounding and, at the largest values, a quarter from rounding the scale itself.
    """

    @property
    def number(self) -> pb.Dtype:
        return pb.INT8_BLOCKS

    def row_bytes(self, hidden_size: int) -> int:
        """A byte for each value, and two for each block."""
        return hidden_size + 2 * _blocks(hidden_size)

    def to_bytes(self, x: torch.Tensor) -> bytes:
        """The values rounded to the nearest int8. A NaN or an Inf makes its block's scale NaN or Inf."""
        rows = x.detach().to("cpu", torch.float32).view(-1, x.shape[-1])
        blocks = _in_blocks(rows)
        scales = (blocks.abs().amax(-1) / LARGEST).to(torch.bfloat16)
        steps = scales.float().masked_fill(scales == 0, 1.0).unsqueeze(-1)
        values = (blocks / steps).round_().clamp_(-LARGEST, LARGEST).nan_to_num_().to(torch.int8)
        flat = values.view(len(rows), -1)[:, : rows.shape[1]].contiguous()
        return _raw(torch.cat([scales.view(torch.uint8), flat.view(torch.uint8)], dim=1))

    def from_bytes(self, data: bytes, hidden_size: int) -> torch.Tensor:
        """The values in float32."""
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, self.row_bytes(hidden_size))
        head = 2 * _blocks(hidden_size)
        scales = raw[:, :head].contiguous().view(torch.bfloat16).float().unsqueeze(-1)
        values = _in_blocks(raw[:, head:].contiguous().view(torch.int8).float()) * scales
        return values.view(len(raw), -1)[:, :hidden_size].unsqueeze(0).contiguous()

    def reader(self, hidden_size: int) -> Read:
        return partial(self.from_bytes, hidden_size=hidden_size)


def converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` in `dtype`. Finite values stay finite.

    A wire form rounds 65504, float16's largest value, to 65536, which would be Inf in float16. `x.to` is not called for
    the same dtype: it takes 20 us between two steps, when its code is cold.
    """
    if x.dtype == dtype:
        return x
    found, most = x.to(dtype), torch.finfo(dtype).max
    return found if math.isfinite(found.sum().item()) else found.clamp(-most, most).where(x.isfinite(), found)


def _blocks(hidden_size: int) -> int:
    return -(-hidden_size // BLOCK)


def _in_blocks(rows: torch.Tensor) -> torch.Tensor:
    """[T, H] as [T, blocks, BLOCK]; zeros pad the last block."""
    missing = -rows.shape[1] % BLOCK
    padded = torch.nn.functional.pad(rows, (0, missing)) if missing else rows
    return padded.view(len(rows), -1, BLOCK)


def _raw(x: torch.Tensor) -> bytes:
    return _array(x).tobytes()


def _array(x: torch.Tensor) -> NDArray[Any]:
    """The memory of `x`, on the CPU. numpy has no bfloat16, so its bits are read as int16."""
    array: NDArray[Any] = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()
    return array
