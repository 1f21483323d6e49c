"""How torch computes, for a while: on how many threads, and how exactly."""

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
def keeping_precision() -> Iterator[None]:
    """After it, compute as exactly as before it, whatever was set inside."""
    before = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def computing_one_token(count: int, precision: str) -> Iterator[None]:
    """Compute one token on the CPU with `count` threads and in full float32 inside, in `precision` after it.

    A row's products wait for the weights, so that fewer bits bring nothing; and with "medium" torch hands those of sdpa
    to oneDNN, which makes them anew for each length of the context: 27.1 ms a token with packed weights in place of
    23.7, 40.1 with plain ones in place of 39.1 (SmolLM2-135M, one thread).

    `precision` is told, not looked up: it is one setting for all threads, and another one may be in here, too.
    """
    with computing_on(count):
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
