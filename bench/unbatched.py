"""A trunk server without batching: each step is a forward of its own, at once, in the thread that read it.

All else is the project's own server. What sharing forwards costs a client that is alone is seen against it.
"""

import time
from dataclasses import replace
from multiprocessing.connection import Connection

import torch

from server.__main__ import listen
from server.auth.tls import Door
from server.build import build
from server.scheduling.engine import Engine, EngineStep
from server.scheduling.sessions import Seat
from server.service import TrunkService
from server.variants import Others
from splitlearn.config import Config
from splitlearn.runtime import process
from splitlearn.runtime.progress import silent
from splitlearn.stages.base import StageInput


class Direct(Engine):
    """Computes each step by itself."""

    def step(
        self,
        seat: Seat,
        position: int,
        x: torch.Tensor,
        timeout_s: float,
        roll_back: bool = False,
        uncertain: int | None = None,
        rope_length: int = 0,
    ) -> EngineStep:
        """One forward for this step alone; nothing is waited for, checked or counted."""
        started = time.perf_counter()
        output = self._stage.step([StageInput(seat.session, position, x, rope_length=rope_length)])[0]
        return EngineStep(output.x, time.perf_counter() - started, 0.0, 0.0)


class Unbatched:
    """The server's process; it listens on `address`."""

    def __init__(self, config: Config) -> None:
        self._child = process.start("The server without batching", _main, config)
        self.address: str = self._child.receive()

    def stop(self) -> None:
        """End the server."""
        self._child.stop()


def _main(connection: Connection, config: Config) -> None:
    settings = config.server.model_copy(update={"port": 0})
    served, door = build(config, silent), Door.of(settings)
    own = served.engine
    engine = Direct(own._stage, served.admission, 1, None, served.metrics, own._own_thread)
    service = TrunkService(replace(served, engine=engine), Others(config, served), settings, door.access)
    running = listen(service, settings, door)
    connection.send(running.address)
    connection.recv()
