"""Functions in machine code. Only what computes by them should import this, since that loads LLVM."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from unittest.mock import patch

import numba
from llvmlite import ir
from numba.core import caching, ccallback, dispatcher

from splitlearn.kernels import digest

CACHE_LINE = 64
log = logging.getLogger(__name__)


class _OfItsFolder:
    """Machine code that is kept is good for the modules of a folder as they are: a function has in it what it calls of
    others, where numba itself looks at the function's own file only."""

    _py_file: str

    def get_source_stamp(self) -> bytes:
        """What numba compares."""
        return digest(Path(self._py_file).parent)


class InGivenFolder(_OfItsFolder, caching.UserProvidedCacheLocator):  # type: ignore[misc]
    """In the folder NUMBA_CACHE_DIR."""


class InTree(_OfItsFolder, caching.InTreeCacheLocator):  # type: ignore[misc]
    """Beside the modules."""


class InUsersFolder(_OfItsFolder, caching.UserWideCacheLocator):  # type: ignore[misc]
    """Where programs of this user keep such things."""


class _Cache(caching.FunctionCache):  # type: ignore[misc]
    """What numba keeps, where it can: a folder that is full or another user's is no reason not to compute."""

    @contextmanager
    def _guard_against_spurious_io_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError, UnpicklingError) as error:
            _say_once(str(error))


@cache
def _say_once(why: str) -> None:
    log.warning(
        "Machine code cannot be kept (%s): it is compiled again at each start, which can take a minute. "
        "NUMBA_CACHE_DIR names another folder for it.",
        why,
    )


PLACES = ",".join(f"{__name__}.{place.__name__}" for place in (InGivenFolder, InTree, InUsersFolder))


def compiled(function: Callable[..., Any]) -> Any:
    """`function` in machine code, without the interpreter's lock, kept for later processes where a folder for that can
    be written."""
    return _kept(numba.njit, function, nogil=True)


def called(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """As `compiled`, for what is called by its `address`, with arguments of those types."""
    return lambda function: _kept(numba.cfunc, function, signature)


def _kept(make: Callable[..., Any], function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        with _places():
            return make(*arguments, cache=True, **options)(function)
    except RuntimeError:  # numba says at once that it found none
        return make(*arguments, **options)(function)


@contextmanager
def _places() -> Iterator[None]:
    """Inside, what numba makes is kept in PLACES, by _Cache."""
    with (
        patch.object(numba.config, "CACHE_LOCATOR_CLASSES", PLACES),
        patch.object(dispatcher, "FunctionCache", _Cache),
        patch.object(ccallback, "FunctionCache", _Cache),
    ):
        yield


def prefetch(builder: Any, place: Any) -> None:
    """Emit what asks for the cache line with the byte at the pointer `place`; an address that is none is no error."""
    address, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [address, number, number, number])
    call = builder.module.declare_intrinsic("llvm.prefetch", [address], kind)
    to_read, keep_close, data = number(0), number(3), number(1)
    builder.call(call, [builder.bitcast(place, address), to_read, keep_close, data])
