"""What a client is to the load test: it answers one request at a time, and says when each token came."""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

from splitlearn.errors import EndpointFull, TrunkFull
from splitlearn.events import Message
from splitlearn.loadtest.plan import LoadRequest, LoadTest
from splitlearn.runtime.process_pool import stop_all
from splitlearn.runtime.progress import Progress, Step

NO_ROOM = (TrunkFull, EndpointFull)
"""A request was refused because the server is full. Both errors say when to try again."""
WARM_UP = LoadRequest(prompt=0, new_tokens=2)


@dataclass(frozen=True)
class AnswerEnd:
    """The end of an answer whose tokens come uncounted, in chunks of text.

    `at` is when the last token was there, in the unit of the chunks' times. The server counted `tokens` of the answer
    and `prompt_tokens`; `server_ttft_s` and `server_tpot_s` are by its own clock, if it says.
    """

    at: float
    tokens: int
    prompt_tokens: int
    server_ttft_s: float | None = None
    server_tpot_s: float | None = None


class Conversation:
    """What a client and the server have said so far. The first turn of a conversation begins it anew."""

    def __init__(self, load: LoadTest) -> None:
        self._load = load
        self._said: tuple[Message, ...] = ()

    def ask(self, job: LoadRequest) -> tuple[Message, ...]:
        """The messages of a request."""
        before = self._said if job.turn else ()
        self._said = (*before, Message("user", self._load.text(job.prompt, job.turn)))
        return self._said

    def answered(self, text: str) -> None:
        """The answer to the last request is `text`."""
        self._said = (*self._said, Message("assistant", text))


Answer = Generator[float | AnswerEnd, None, None]
"""When each token of an answer came, by `time.perf_counter` of this process; or each chunk of it, and then its end."""


class Client(Protocol):
    """One request at a time; used by one thread, closed by any."""

    def answer(self, job: LoadRequest) -> Answer:
        """Answer a request. Raises SplitlearnError if it is refused or fails."""

    def warm(self) -> None:
        """Warm up: do once what is slow the first time."""

    def close(self) -> None:
        """End, together with the current request."""


Member = TypeVar("Member", bound=Client)


@contextmanager
def warmed(clients: Sequence[Member], progress: Progress) -> Iterator[list[Client]]:
    """The clients, warm. They are closed when the context is left."""
    made: list[Client] = list(clients)
    try:
        _warm(made, progress)
        yield made
    finally:
        close(made)


def close(clients: Sequence[Client]) -> None:
    """Close all clients at the same time: one may take a second or more."""
    stop_all([client.close for client in clients])


def _warm(clients: Sequence[Client], progress: Progress) -> None:
    """Warm all clients up at once, as far as the server has room. Raises the first error that is not of NO_ROOM."""

    def warm(client: Client) -> None:
        with suppress(*NO_ROOM):
            client.warm()

    with ThreadPoolExecutor(min(len(clients), 32)) as pool:
        try:
            for count, _ in enumerate(pool.map(warm, clients), 1):
                progress(Step("Starting the clients", count, len(clients)))
        except BaseException:  # Ctrl-C, too: the pool waits for clients that warm up, and some of them for the server
            close(clients)
            raise
