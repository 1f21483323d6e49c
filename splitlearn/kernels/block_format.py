"""Converts a matrix [N, K] to blocks and back.

Blocks of 32 bits hold the matrix's values in another order. In blocks of 4 or 8 bits each value is an integer times a
scale, plus an offset. GROUP neighbouring values of a row share scale and offset. This is asymmetric round-to-nearest.
Weights that had as few bits before, as those of GGUF's Q4_0, Q4_1, Q4_K and Q8_0, keep their values. kernels/
block_matmul.py multiplies with blocks, and describes the layout of a block.
"""

import mmap
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad

BITS = (4, 8, 32)
LANES, GROUP = 16, 32
SCALES_BYTES = 2 * 2 * LANES
HUGE_PAGE = 2 << 20
# So many values are rounded at a time: what is computed on the way takes ten times their memory.
VALUES = 1 << 19
# Values are on a grid if they are off by these parts of its step and of its offset at most: float16 rounds both.
OFF_GRID, OFFSET_ROUNDING = 0.02, 2.0**-11
# The fewest steps between the smallest and the largest value of a group for which grids are looked for.
FEWEST_STEPS = 7


def block_bytes(bits: int) -> int:
    """The bytes of one block of `bits`, one of BITS."""
    return (0 if bits == 32 else SCALES_BYTES) + GROUP * LANES * bits // 8


def bits_of(size: int) -> int:
    """The bits of a format whose blocks have `size` bytes."""
    return next(bits for bits in BITS if block_bytes(bits) == size)


def shape_in_blocks(n: int, k: int, bits: int) -> tuple[int, int, int]:
    """The shape of the blocks of a matrix [n, k]: [ceil(n / LANES), ceil(k / GROUP), bytes of a block]."""
    return -(-n // LANES), -(-k // GROUP), block_bytes(bits)


def to_blocks(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The blocks of `weight` [N, K], uint8 of `shape_in_blocks`, padded with zeros."""
    n, k = weight.shape
    blocks = torch.empty(shape_in_blocks(n, k, bits), dtype=torch.uint8)
    fill_blocks(blocks, weight, bits)
    return blocks


def fill_blocks(blocks: torch.Tensor, weight: torch.Tensor, bits: int) -> None:
    """Write the blocks of `weight` [N, K] to `blocks`, which have `shape_in_blocks`.

    With 4 and 8 bits, a group's offset is its smallest value, and its scale is (largest - smallest) / (2**bits - 1),
    unless the values are on another grid of so many bits.
    """
    groups = max(1, VALUES // (LANES * weight.shape[1]))
    for part, rows in zip(torch.split(blocks, groups), torch.split(weight, groups * LANES), strict=True):
        _fill_part(part, rows, bits)


def _fill_part(blocks: torch.Tensor, weight: torch.Tensor, bits: int) -> None:
    n, k = weight.shape
    whole = pad(weight, (0, -k % GROUP, 0, -n % LANES)) if n % LANES or k % GROUP else weight
    values = whole.view(len(blocks), LANES, -1, GROUP).transpose(1, 2)
    if bits == 32:
        blocks.view(torch.float32).view(*blocks.shape[:2], GROUP, LANES).copy_(values.transpose(2, 3))
    else:
        blocks.copy_(_few_bits(values.float(), bits))


def _few_bits(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The blocks of `values` [groups, count, LANES, GROUP], of 4 or 8 bits."""
    scale, offset = _scale_and_offset(values, bits)
    q = _steps(values, scale, offset).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    q = q.transpose(2, 3)
    if bits == 4:
        q = q[:, :, : GROUP // 2] | q[:, :, GROUP // 2 :] << 4
    scales = torch.stack([scale, offset], dim=2).view(torch.uint8)
    return torch.cat([scales.flatten(2), q.flatten(2)], dim=2)


def _scale_and_offset(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The float16 scale and offset of each group of `values` [..., GROUP], both [...]."""
    low, high = values.amin(-1), values.amax(-1)
    scale, offset = ((high - low) / (2**bits - 1)).half(), low.half()
    sample = values[:1, :1]
    if not torch.stack([fits for *_, fits in _grids(sample, bits)]).any(0).all():
        return scale, offset
    left = torch.ones_like(scale, dtype=torch.bool)
    for other_scale, other_offset, fits in _grids(values, bits):
        better = left & fits
        scale, offset = torch.where(better, other_scale, scale), torch.where(better, other_offset, offset)
        left &= ~better
        if not left.any():
            break
    return scale, offset


def _grids(values: torch.Tensor, bits: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Scales and offsets that groups of `values` may have been made with, and which groups were.

    As in GGUF's Q4_0 and Q8_0, whose values are exact; then, as in Q4_1 and Q4_K, from the smallest to the largest
    value in at most 2**bits - 1 steps.
    """
    low, high, middle = values.amin(-1), values.amax(-1), 2 ** (bits - 1)
    largest = torch.where(high.abs() > low.abs(), high, low)
    scale = (-largest / middle if bits == 4 else largest.abs() / (middle - 1)).half()
    yield scale, -middle * scale, _off_grid(values, scale, -middle * scale, bits) == 0
    for steps in range(2**bits - 1, FEWEST_STEPS - 1, -1) if bits == 4 else ():
        scale = ((high - low) / steps).half()
        near = OFF_GRID * scale.float() + OFFSET_ROUNDING * low.abs()
        yield scale, low.half(), _off_grid(values, scale, low.half(), bits) <= near


def _off_grid(values: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, bits: int) -> torch.Tensor:
    """How far a value of each group is at most from the next one that its block could hold."""
    q = _steps(values, scale, offset).round_().clamp_(0, 2**bits - 1)
    held = q * scale.float().unsqueeze(-1) + offset.float().unsqueeze(-1)
    return (values - held).abs().amax(-1)


def _steps(values: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """How many times the scale each value is above the offset."""
    by = scale.float().masked_fill(scale == 0, 1.0).unsqueeze(-1)
    return (values - offset.float().unsqueeze(-1)) / by


def from_blocks(blocks: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The float32 matrix [n, k] of `blocks`."""
    groups, count, size = blocks.shape
    if bits_of(size) == 32:
        return _matrix(blocks.view(torch.float32).view(groups, count, GROUP, LANES), n, k)
    scales = blocks[:, :, :SCALES_BYTES].contiguous().view(torch.float16).view(groups, count, 2, 1, LANES).float()
    q = blocks[:, :, SCALES_BYTES:].reshape(groups, count, -1, LANES)
    if bits_of(size) == 4:
        q = torch.cat([q & 15, q >> 4], dim=2)
    return _matrix(q.float() * scales[:, :, 0] + scales[:, :, 1], n, k)


def _matrix(values: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Rearrange [groups, count, GROUP, LANES] to [n, k]."""
    groups, count = values.shape[:2]
    return values.permute(0, 3, 1, 2).reshape(groups * LANES, count * GROUP)[:n, :k].contiguous()


def memory(size: int) -> NDArray[np.uint8]:
    """`size` bytes of zeros, in huge pages if the system has them. They are freed with their last reference."""
    mapped = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and size >= HUGE_PAGE:
        mapped.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(mapped, np.uint8)
    return whole[-whole.ctypes.data % HUGE_PAGE :][:size]
