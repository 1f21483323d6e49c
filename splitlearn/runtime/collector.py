"""Python's garbage collector, which looks through all that is imported, again and again, for a sixth of the time."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def resting() -> Iterator[None]:
    """Inside, nothing is collected. What is there at the end is never looked at again, nor copied in a fork for it."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def rest_at_exit() -> None:
    """Let the interpreter end without a look through all that is imported, which takes a second of a processor."""
    atexit.register(gc.freeze)
