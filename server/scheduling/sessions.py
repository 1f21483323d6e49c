"""A session's seat at the engine, and a step of it that is under way."""

import secrets
import threading
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from statistics import median_low

import torch

from server.scheduling.admission import Place
from server.scheduling.scheduler import NEVER
from splitlearn.errors import SplitlearnError
from splitlearn.stages.local import LocalSession

# A client that takes so many times what it usually takes, and the slack, is not waited for any more.
OVERDUE, SLACK_S, LONGEST_AWAY_S = 3.0, 0.005, 1.0
# So many of a client's last pauses tell how long it usually takes.
PAUSES = 5
KEY_BYTES = 16


@dataclass
class Seat:
    """A session at the engine. `away_s` is how long its client usually takes between an answer and the next step."""

    session: LocalSession
    applied: frozenset[str]
    place: Place
    packs: bool = True
    """Whether its steps can share a forward with those of other sessions."""
    answered: float | None = None
    away_s: float = float("inf")
    pauses: deque[float] = field(default_factory=lambda: deque(maxlen=PAUSES))
    running: bool = False
    copied: int = 0
    """How many copies of a cache, of its own or into its own, are under way."""
    unwanted: int = 0
    """The last step that its client said it does not want, nor those before it."""
    closed: bool = False
    freed: bool = False
    key: bytes = field(default_factory=lambda: secrets.token_bytes(KEY_BYTES))
    """By which another session can branch from this one."""

    @property
    def holder(self) -> str:
        """Whose it is."""
        return self.place.holder

    @property
    def recomputes(self) -> bool:
        """Whether each step brings the whole prefix: its flags keep no cache from step to step."""
        return self.session.settings.new_cache is None

    @property
    def idle(self) -> bool:
        """Whether nobody uses its memory."""
        return not self.running and not self.copied

    @property
    def group(self) -> Hashable:
        """What sessions must have in common to share a forward: what their flags ask of it. Form on the wire, cache and
        autograd's bookkeeping change nothing of what is computed."""
        arguments = tuple(sorted(self.session.settings.forward_arguments.items()))
        return arguments if self.packs else id(self)

    @property
    def due_s(self) -> float:
        """When its client should bring the next step."""
        return (self.answered or 0.0) + self.away_s

    @property
    def overdue_s(self) -> float:
        """From when on it is not waited for any more; a client that was never answered is not waited for at all."""
        return 0.0 if self.answered is None else self.answered + OVERDUE * min(self.away_s, LONGEST_AWAY_S) + SLACK_S

    def returns(self, now: float) -> None:
        """Its client has brought the next step. The median: one long pause, as after a prompt, says nothing."""
        if self.answered is not None:
            self.pauses.append(now - self.answered)
            self.away_s = median_low(self.pauses)


@dataclass(eq=False)
class Job:
    """A step under way: `x` [1, T, H] from `position` on, of which `done` tokens are computed."""

    seat: Seat
    position: int
    x: torch.Tensor
    deadline: float
    began: float
    uncertain: int | None = None
    """Its number, where its client may say that it does not want it."""
    rope_length: int = 0
    """That of `StageInput`."""
    wake: threading.Event | None = None
    """What its thread waits for, where another one leads."""
    outputs: list[torch.Tensor] = field(default_factory=list)
    done: int = 0
    trunk_s: float = 0.0
    compile_s: float = 0.0
    ran: int = NEVER
    """The number of the last forward that computed a part of it."""
    error: SplitlearnError | None = None

    def unwanted(self) -> bool:
        """Whether its client said so."""
        return self.uncertain is not None and self.uncertain <= self.seat.unwanted

    @property
    def group(self) -> Hashable:
        """Its session's."""
        return self.seat.group

    @property
    def holder(self) -> Hashable:
        """Its session's."""
        return self.seat.holder

    @property
    def left(self) -> int:
        """Tokens still to compute."""
        return self.x.shape[1] - self.done

    def next(self, tokens: int) -> torch.Tensor:
        """The next `tokens` to compute."""
        return self.x if tokens == self.x.shape[1] else self.x[:, self.done : self.done + tokens]

    @property
    def finished(self) -> bool:
        """Whether the answer, or the error, is there."""
        return self.error is not None or not self.left
