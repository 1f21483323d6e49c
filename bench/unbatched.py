"""The project's trunk server without batching: each step runs at once, by itself, in the thread that read it.

It is the baseline for what batching costs a client that is alone.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection

from server.auth.tls import Security
from server.build import TrunkRuntime, build
from server.program import listen
from server.service import TrunkService
from server.variants import Variants
from splitlearn.config import Config
from splitlearn.events import StageTiming
from splitlearn.runtime import process
from splitlearn.runtime.progress import silent
from splitlearn.scheduling.engine import Engine
from splitlearn.scheduling.sessions import EngineSession
from splitlearn.stages.base import StageInput, StageOutput


class Direct(Engine):
    """Computes each step by itself."""

    def __init__(self, runtime: TrunkRuntime) -> None:
        unused = ThreadPoolExecutor(1)
        super().__init__(runtime.stage, runtime.admission, runtime.engine.limits, runtime.metrics.forward, unused)
        self._alone = runtime.stage

    def step(self, session: EngineSession, item: StageInput, *, truncate: bool = False) -> StageOutput:
        """Compute this step alone, without waiting, checks or metrics."""
        started = time.perf_counter()
        output = self._alone.step([item])[0]
        return StageOutput(output.x, StageTiming({"trunk": time.perf_counter() - started, "queue": 0.0}))


class Unbatched:
    """The server's process, which listens on `address`."""

    def __init__(self, config: Config) -> None:
        self._child = process.start("The server without batching", _main, config)
        self.address: str = self._child.receive()

    def stop(self) -> None:
        """End the server."""
        self._child.stop()


def _main(connection: Connection, config: Config) -> None:
    settings = config.server.model_copy(update={"port": 0})
    runtime, security = build(config, silent), Security.of(settings)
    service = TrunkService(replace(runtime, engine=Direct(runtime)), Variants(config, runtime), settings, security)
    running = listen(service, settings, security)
    connection.send(running.address)
    connection.recv()
