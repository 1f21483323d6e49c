"""What answers requests: a real split client in a process of its own, or a replay of recorded hidden states.

`answer(job)` yields, for each token of the answer, when it was there (`time.perf_counter` of this process).
"""

import contextlib
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Protocol

from splitlearn.arms.spec import ArmEnd, ArmReady, ArmSpec
from splitlearn.arms.worker import raised, start
from splitlearn.errors import SplitlearnError, TrunkFull
from splitlearn.events import GenerationRequest, TokenEvent
from splitlearn.loadtest.plan import Asked, Job
from splitlearn.loadtest.recording import Recording
from splitlearn.loadtest.replay import ReplayClient
from splitlearn.runtime.process import default_threads
from splitlearn.runtime.progress import Progress, Step

WARM_UP = Job(prompt=0, new_tokens=2)


class Client(Protocol):
    """One request at a time; used by one thread, closed by any."""

    def answer(self, job: Job) -> Generator[float, None, None]:
        """The time of each token of the answer. Raises SplitlearnError for an answer that was refused or broke."""

    def warm(self) -> None:
        """Do once what takes longer the first time."""

    def close(self) -> None:
        """End, with the request that is under way."""


class RealClient:
    """A split arm's worker process: bottom and top of its own, its own connection."""

    def __init__(self, spec: ArmSpec, prompts: Sequence[str], chat: bool | str) -> None:
        self._prompts, self._chat = prompts, chat
        self._child = start(spec)

    def warm(self) -> None:
        """Wait until the model is loaded, then run a short request."""
        ready = raised(self._child.receive())
        if not isinstance(ready, ArmReady):
            raise SplitlearnError("A client's worker process did not say that it is ready.")
        for _ in self.answer(WARM_UP):
            pass

    def answer(self, job: Job) -> Generator[float, None, None]:
        """The first token's time is when it was heard of here, so that handing over to the other process counts; the
        later ones follow by the worker's clock."""
        chosen = GenerationRequest(self._prompts[job.prompt], job.new_tokens, chat=self._chat, ignore_eos=True)
        self._child.send(chosen)
        offset: float | None = None
        while not isinstance(item := raised(self._child.receive()), ArmEnd):
            if isinstance(item, TokenEvent):
                offset = time.perf_counter() - item.time_s if offset is None else offset
                yield from [offset + item.time_s] * len(item.token_ids)

    def close(self) -> None:
        """End the worker."""
        self._child.stop()


def client_threads(clients: int) -> int:
    """Threads of each of so many real clients on this machine: together no more than it has cores, if that is
    possible."""
    return max(1, default_threads() // clients)


@contextmanager
def real_clients(spec: ArmSpec, asked: Asked, chat: bool | str, progress: Progress) -> Iterator[list[Client]]:
    """Loaded and warm; ended when the context is left."""
    with contextlib.ExitStack() as stack:
        made: list[Client] = []
        for number in range(asked.clients):
            own = replace(spec, threads=client_threads(asked.clients), copy=number)
            made.append(RealClient(own, asked.prompts, chat))
            stack.callback(made[-1].close)
        _warm(made, progress)
        yield made


@contextmanager
def replay_clients(
    spec: ArmSpec, asked: Asked, recordings: Sequence[Recording], progress: Progress
) -> Iterator[list[Client]]:
    """Connected; closed when the context is left."""
    made: list[Client] = [ReplayClient(spec, recordings) for _ in range(asked.clients)]
    try:
        _warm(made, progress)
        yield made
    finally:
        for client in made:
            client.close()


def _warm(clients: Sequence[Client], progress: Progress) -> None:
    """All at once, as far as the server has room. Raises the first error that is not for want of room."""

    def warm(client: Client) -> None:
        with suppress(TrunkFull):
            client.warm()

    with ThreadPoolExecutor(min(len(clients), 32)) as pool:
        for count, _ in enumerate(pool.map(warm, clients), 1):
            progress(Step("Starting the clients", count, len(clients)))
