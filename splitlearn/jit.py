"""Functions in machine code. Only what computes by them should import this, since that loads LLVM."""

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., None]) -> Any:
    """`function` in machine code, without the interpreter's lock, kept for later processes where a folder for that can
    be written."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba says at once that it found none
        return numba.njit(nogil=True)(function)
