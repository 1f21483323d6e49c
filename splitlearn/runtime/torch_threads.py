"""Context managers for torch's process-wide settings: number of threads, and float32 precision."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def computing_on(count: int) -> Iterator[None]:
    """Compute with `count` threads inside; setting the number takes a tenth of a microsecond."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def in_full_float32(count: int, precision: str) -> Iterator[None]:
    """Compute on the CPU with `count` threads and in full float32; set `precision` on leaving.

    One row's products wait for the weights, so fewer bits bring nothing. And with "medium" torch hands sdpa's products
    to oneDNN, which builds them again for each length of the context: 27.1 ms a token with packed weights in place of
    23.7, 40.1 with plain ones in place of 39.1; a prompt of 20 tokens takes 37 ms with 4 bits in place of 31
    (SmolLM2-135M, one thread).

    `precision` is passed in, not read back: the setting is process-wide, and another thread may have changed it.
    """
    with computing_on(count):
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
