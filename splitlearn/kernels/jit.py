"""Compiles functions to machine code by numba, and caches it for later processes.

    @compiled
    def double(x): ...

To import this module loads LLVM, so import it only where it is used.
"""

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


class _StampedByFolder:
    """Invalidates machine code when any module of its folder changes, since a function contains the functions that it
    calls. numba itself checks only the function's own file."""

    _py_file: str

    def get_source_stamp(self) -> bytes:
        """The stamp that numba compares."""
        return digest(Path(self._py_file).parent)


class InGivenFolder(_StampedByFolder, caching.UserProvidedCacheLocator):  # type: ignore[misc]
    """Caches in the folder NUMBA_CACHE_DIR."""


class InTree(_StampedByFolder, caching.InTreeCacheLocator):  # type: ignore[misc]
    """Caches next to the modules."""


class InUsersFolder(_StampedByFolder, caching.UserWideCacheLocator):  # type: ignore[misc]
    """Caches in the user's cache folder."""


LOCATORS = ",".join(f"{__name__}.{locator.__name__}" for locator in (InGivenFolder, InTree, InUsersFolder))


class _Cache(caching.FunctionCache):  # type: ignore[misc]
    """numba's cache. Warns instead of failing if the folder is full or belongs to another user."""

    @contextmanager
    def _guard_against_spurious_io_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError, UnpicklingError) as error:
            _warn_once(str(error))


@cache
def _warn_once(why: str) -> None:
    log.warning(
        "Machine code cannot be cached (%s): it is compiled again at each start, which can take a minute. "
        "NUMBA_CACHE_DIR names another folder for it.",
        why,
    )


def compiled(function: Callable[..., Any]) -> Any:
    """Compile `function` to run without the interpreter lock, and cache it if a folder is writable."""
    return _compile(numba.njit, function, nogil=True)


def called(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """As `compiled`, for a function that is called by its `address`, with arguments of the types in `signature`. It is
    compiled at once, so define the functions that it calls before it."""
    return lambda function: _compile(numba.cfunc, function, signature)


def _compile(make: Callable[..., Any], function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        with _our_cache():
            return make(*arguments, cache=True, **options)(function)
    except RuntimeError:  # numba found no folder for its cache
        return make(*arguments, **options)(function)


@contextmanager
def _our_cache() -> Iterator[None]:
    """Let numba use _Cache, in a folder found by LOCATORS, inside a `with` block."""
    with (
        patch.object(numba.config, "CACHE_LOCATOR_CLASSES", LOCATORS),
        patch.object(dispatcher, "FunctionCache", _Cache),
        patch.object(ccallback, "FunctionCache", _Cache),
    ):
        yield


def prefetch(builder: Any, place: Any) -> None:
    """Emit a prefetch of the cache line at the pointer `place`. An address outside of memory is no error."""
    address, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [address, number, number, number])
    call = builder.module.declare_intrinsic("llvm.prefetch", [address], kind)
    to_read, keep_close, data = number(0), number(3), number(1)
    builder.call(call, [builder.bitcast(place, address), to_read, keep_close, data])
