"""When a call of the API runs: it waits as the page's own runs do, ends when its caller goes, and fails in one line."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import gradio as gr

from splitlearn.errors import InputError, SplitlearnError
from splitlearn.lab.job import JobStatus
from ui.compare.actions import Handlers
from ui.visitors import visitor

POLL_S = 0.1
ENDED = "The call ended early."
# What the checks of other tabs call a parameter of `plan_cut`.
NAMES = {"split.start": "start", "split.end": "end", "memory": "client_memory_mb"}


class Turns:
    """The turns of the calls among the page's visitors."""

    def __init__(self, handlers: Handlers) -> None:
        self.handlers = handlers

    @contextmanager
    def call(self, request: gr.Request) -> Iterator[str]:
        """What splitlearn raises is one line for the caller. Gives the visitor whose signal stops the call."""
        who = visitor(request)
        self.handlers.stops.begin(who)
        try:
            yield who
        except InputError as error:
            known = InputError(NAMES.get(error.field, error.field), error.value, error.expected)
            raise gr.Error(str(known), print_exception=False) from None
        except SplitlearnError as error:
            raise gr.Error(str(error), print_exception=False) from None

    @contextmanager
    def turn(self, request: gr.Request) -> Iterator[str]:
        """The same, in the line's first place: Gradio has given this call its turn."""
        # A name of its own: one visitor may make several calls at once.
        with self.call(request) as who, self.handlers.line.turn(uuid4().hex):
            yield who

    def quiet(self, who: str) -> Iterator[str]:
        """Wait until everything is loaded and the runs that came before have ended."""
        startup, line, stopped = self.handlers.startup, self.handlers.line, self.handlers.stops.signal(who)
        startup.begin()
        if startup.running:
            yield "Waiting until the model and both arms are loaded."
            startup.wait(stopped)
        call = uuid4().hex
        try:
            if line.join(call):
                yield "Waiting until the runs that came before have ended."
            while line.place(call) and not stopped.is_set():
                time.sleep(POLL_S)
        finally:
            line.leave(call)
        self.check(who)

    def check(self, who: str) -> None:
        """Raises SplitlearnError when the caller has left."""
        if self.handlers.stops.signal(who).is_set():
            raise SplitlearnError(ENDED)

    def experiment(self, who: str) -> Iterator[JobStatus]:
        """The experiment of this call as it goes on, to its end. It is stopped when the caller has left."""
        job, stopped, before = self.handlers.lab.job, self.handlers.stops.signal(who), None
        try:
            while before is None or not before.ended:
                if stopped.is_set():
                    job.stop()
                latest = job.latest
                if latest is not None and latest is not before:
                    before = latest
                    yield latest
                time.sleep(POLL_S)
        except GeneratorExit:
            job.stop()
            raise
