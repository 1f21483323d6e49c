"""Many generations of a loaded arm at once, in its worker process: each has a thread, and their steps share forwards.

The engines (scheduling/batching.py) are made with the first of them. What a generation gives is sent under its number.
Its last message is an ArmEnd or an error, also if it was cancelled.
"""

import math
import pickle
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from multiprocessing.connection import Connection

from splitlearn.arms.spec import ArmEnd, Served, ServedItem, ServeRequest
from splitlearn.arms.texts import texts_of
from splitlearn.client.remote_stage import RemoteStage
from splitlearn.errors import as_error
from splitlearn.events import Event
from splitlearn.generation.generator import Generator
from splitlearn.runtime import process
from splitlearn.scheduling.batching import Batching
from splitlearn.scheduling.contract import Client
from splitlearn.stages.base import Stage

Send = Callable[[object], None]
Over = Callable[[ServeRequest, Sequence[Stage], Sequence[RemoteStage]], Generator]


class Departure:
    """Whether a client has gone. Calls back once it does."""

    def __init__(self) -> None:
        self.gone = False
        self._lock = threading.Lock()
        self._calls: list[Callable[[], None]] = []

    def when_gone(self, call: Callable[[], None]) -> bool:
        """Call `call` when the client goes. Returns False if it has gone already."""
        with self._lock:
            self._calls.append(call)
            return not self.gone

    def leave(self) -> None:
        """The client goes."""
        with self._lock:
            self.gone = True
        for call in self._calls:
            call()


class Serving:
    """The generations under way. `over` makes the decode loop over the stages and `trunks` of one client; `send` takes
    messages."""

    def __init__(self, batching: Batching, trunks: Sequence[RemoteStage], over: Over, send: Send) -> None:
        self._batching, self._trunks, self._over, self._send = batching, trunks, over, send
        self._departures: dict[int, Departure] = {}

    def start(self, asked: ServeRequest) -> None:
        """Begin a generation."""
        departure = self._departures[asked.number] = Departure()
        threading.Thread(target=self._work, args=(asked, departure), daemon=True).start()

    def cancel(self, number: int) -> None:
        """End a generation soon. Does nothing for one that has ended."""
        departure = self._departures.get(number)
        if departure is not None:
            departure.leave()

    def _work(self, asked: ServeRequest, departure: Departure) -> None:
        try:
            end: Served = self._run(asked, departure)
        except Exception as error:  # the generation fails with its cause; the others go on
            end = as_error(error, "generating")
        del self._departures[asked.number]
        self._send(ServedItem(asked.number, end))

    def _run(self, asked: ServeRequest, departure: Departure) -> ArmEnd:
        client = Client(math.inf, asked.holder, departure.when_gone, asked.batch)
        trunks = [trunk.for_client(departure.when_gone, asked.batch) for trunk in self._trunks]
        answers, events = self._over(asked, self._batching.stages(client), trunks), list[Event]()
        with closing(answers.stream(asked.request)) as found:
            for event in found:
                self._send(ServedItem(asked.number, event))
                events.append(event)
                if departure.gone:
                    break
        facts = tuple(facts for trunk in trunks for facts in trunk.facts_of_each)
        return ArmEnd(process.peak_resident_bytes(), facts, texts_of(answers.tokens, events, asked.request))


def sender(connection: Connection) -> Send:
    """Sends messages of several threads to the parent."""
    lock = threading.Lock()

    def send(message: object) -> None:
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        with lock:
            connection.send_bytes(data)

    return send
