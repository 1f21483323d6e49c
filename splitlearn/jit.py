"""Functions in machine code. Only what computes by them should import this, since that loads LLVM."""

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir

CACHE_LINE = 64


def compiled(function: Callable[..., None]) -> Any:
    """`function` in machine code, without the interpreter's lock, kept for later processes where a folder for that can
    be written."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba says at once that it found none
        return numba.njit(nogil=True)(function)


def prefetch(builder: Any, place: Any) -> None:
    """Emit what asks for the cache line with the byte at the pointer `place`; an address that is none is no error."""
    address, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [address, number, number, number])
    call = builder.module.declare_intrinsic("llvm.prefetch", [address], kind)
    to_read, keep_close, data = number(0), number(3), number(1)
    builder.call(call, [builder.bitcast(place, address), to_read, keep_close, data])
