"""Clients of a trunk: real split clients in processes of their own, or replays of recorded hidden states."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

from splitlearn.arms.spec import ArmEnd, ArmReady, ArmSpec
from splitlearn.arms.worker import start
from splitlearn.errors import SplitlearnError
from splitlearn.events import Done, GenerationRequest, TokenEvent
from splitlearn.loadtest.clients import WARM_UP, Answer, Client, Conversation, close, warmed
from splitlearn.loadtest.plan import LoadRequest, LoadTest
from splitlearn.loadtest.recording import Recording
from splitlearn.loadtest.replay import ReplayClient
from splitlearn.runtime.process import default_threads, raised
from splitlearn.runtime.progress import Progress


class RealClient:
    """A split arm's worker process, with its own bottom, top and connection."""

    def __init__(self, spec: ArmSpec, load: LoadTest, chat: bool | str) -> None:
        self._conversation, self._chat = Conversation(load), chat
        self._flags, self._child = spec.flags, start(spec)

    def warm(self) -> None:
        """Wait until the model is loaded, then run a short request."""
        ready = raised(self._child.receive())
        if not isinstance(ready, ArmReady):
            raise SplitlearnError("A client's worker process did not say that it is ready.")
        for _ in self.answer(WARM_UP):
            pass

    def answer(self, job: LoadRequest) -> Answer:
        """Yield token times: the first by this process's clock, pipe included, the others by the worker's."""
        said = self._conversation.ask(job)
        prompt = said[0].content if len(said) == 1 else said
        self._child.send((self._flags, GenerationRequest(prompt, job.new_tokens, chat=self._chat, ignore_eos=True)))
        offset, text = None, ""
        while not isinstance(item := raised(self._child.receive()), ArmEnd):
            text += item.text if isinstance(item, TokenEvent | Done) else ""
            if isinstance(item, TokenEvent):
                offset = time.perf_counter() - item.time_s if offset is None else offset
                yield from [offset + item.time_s] * len(item.token_ids)
        self._conversation.answered(text)

    def close(self) -> None:
        """End the worker."""
        self._child.stop()


def client_threads(clients: int) -> int:
    """Threads of each of `clients` real clients: together no more than the machine's cores, if possible."""
    return max(1, default_threads() // clients)


@contextmanager
def real_clients(spec: ArmSpec, load: LoadTest, chat: bool | str, progress: Progress) -> Iterator[list[Client]]:
    """Real clients, loaded and warm. They end when the context is left."""
    made: list[RealClient] = []
    try:
        for number in range(load.clients):
            own = replace(spec, threads=client_threads(load.clients), copy=number)
            made.append(RealClient(own, load, chat))
    except BaseException:
        close(made)
        raise
    with warmed(made, progress) as clients:
        yield clients


def replay_clients(
    spec: ArmSpec, load: LoadTest, recordings: Sequence[Recording], progress: Progress
) -> AbstractContextManager[list[Client]]:
    """Replaying clients, connected. They are closed when the context is left."""
    return warmed([ReplayClient(spec, recordings) for _ in range(load.clients)], progress)
