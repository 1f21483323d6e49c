"""What an engine needs of a stage's sessions, and what it is told of the clients that open them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from splitlearn.stages.base import KeepsPrefixes
from splitlearn.stages.settings import SessionSettings

Count = Callable[[int, int, float], None]
"""Is told of each forward: how many steps it computed, of how many tokens, and in how many seconds."""
WhenGone = Callable[[Callable[[], None]], bool]
"""Registers a callback for the client's end. Returns False if the client has gone already."""


@dataclass(frozen=True)
class Client:
    """Who opens a session: how long it waits for room and for each step, the holder that it counts for, and how its end
    is noticed. `batch`: nobody waits for the answer at a keyboard (admission.py)."""

    timeout_s: float
    holder: str
    when_gone: WhenGone
    batch: bool = False


class OwnSession(KeepsPrefixes, Protocol):
    """A session of the stage itself. `shares`: its steps can share a forward with those of other sessions."""

    @property
    def settings(self) -> SessionSettings: ...
    @property
    def shares(self) -> bool: ...
