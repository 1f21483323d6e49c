"""Clients that answer requests: a real split client in a process of its own, or a replay of recorded hidden states.

`answer(job)` yields the time of each token of the answer (`time.perf_counter` of this process).
"""

import contextlib
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Protocol

from splitlearn.arms.spec import ArmEnd, ArmReady, ArmSpec
from splitlearn.arms.worker import start
from splitlearn.errors import SplitlearnError, TrunkFull
from splitlearn.events import GenerationRequest, TokenEvent
from splitlearn.loadtest.plan import LoadRequest, LoadTest
from splitlearn.loadtest.recording import Recording
from splitlearn.loadtest.replay import ReplayClient
from splitlearn.runtime.process import default_threads, raised
from splitlearn.runtime.progress import Progress, Step

WARM_UP = LoadRequest(prompt=0, new_tokens=2)


class Client(Protocol):
    """One request at a time; used by one thread, closed by any."""

    def answer(self, job: LoadRequest) -> Generator[float, None, None]:
        """Yield the time of each token of the answer. Raises SplitlearnError if it is refused or fails."""

    def warm(self) -> None:
        """Warm up: do once what is slow the first time."""

    def close(self) -> None:
        """End, together with the current request."""


class RealClient:
    """A split arm's worker process, with its own bottom, top and connection."""

    def __init__(self, spec: ArmSpec, prompts: Sequence[str], chat: bool | str) -> None:
        self._prompts, self._chat = prompts, chat
        self._flags, self._child = spec.flags, start(spec)

    def warm(self) -> None:
        """Wait until the model is loaded, then run a short request."""
        ready = raised(self._child.receive())
        if not isinstance(ready, ArmReady):
            raise SplitlearnError("A client's worker process did not say that it is ready.")
        for _ in self.answer(WARM_UP):
            pass

    def answer(self, job: LoadRequest) -> Generator[float, None, None]:
        """Yield token times: the first by this process's clock, pipe included, the others by the worker's."""
        chosen = GenerationRequest(self._prompts[job.prompt], job.new_tokens, chat=self._chat, ignore_eos=True)
        self._child.send((self._flags, chosen))
        offset: float | None = None
        while not isinstance(item := raised(self._child.receive()), ArmEnd):
            if isinstance(item, TokenEvent):
                offset = time.perf_counter() - item.time_s if offset is None else offset
                yield from [offset + item.time_s] * len(item.token_ids)

    def close(self) -> None:
        """End the worker."""
        self._child.stop()


def client_threads(clients: int) -> int:
    """Threads of each of `clients` real clients: together no more than the machine's cores, if possible."""
    return max(1, default_threads() // clients)


@contextmanager
def real_clients(spec: ArmSpec, load: LoadTest, chat: bool | str, progress: Progress) -> Iterator[list[Client]]:
    """Real clients, loaded and warm. They end when the context is left."""
    with contextlib.ExitStack() as stack:
        made: list[Client] = []
        for number in range(load.clients):
            own = replace(spec, threads=client_threads(load.clients), copy=number)
            made.append(RealClient(own, load.prompts, chat))
            stack.callback(made[-1].close)
        _warm(made, progress)
        yield made


@contextmanager
def replay_clients(
    spec: ArmSpec, load: LoadTest, recordings: Sequence[Recording], progress: Progress
) -> Iterator[list[Client]]:
    """Replaying clients, connected. They are closed when the context is left."""
    made: list[Client] = [ReplayClient(spec, recordings) for _ in range(load.clients)]
    try:
        _warm(made, progress)
        yield made
    finally:
        for client in made:
            client.close()


def _warm(clients: Sequence[Client], progress: Progress) -> None:
    """Warm all clients up at once, as far as the server has room. Raises the first error that is not TrunkFull."""

    def warm(client: Client) -> None:
        with suppress(TrunkFull):
            client.warm()

    with ThreadPoolExecutor(min(len(clients), 32)) as pool:
        for count, _ in enumerate(pool.map(warm, clients), 1):
            progress(Step("Starting the clients", count, len(clients)))
