"""Queueing, cancellation and errors of API calls: a call queues with the page's runs and ends when its caller
leaves."""

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
# Parameters of `plan_cut`, by the names that the checks of other tabs use in errors.
NAMES = {"split.start": "start", "split.end": "end", "memory": "client_memory_mb"}


class Turns:
    """Runs API calls in turn with the page's visitors."""

    def __init__(self, handlers: Handlers) -> None:
        self.handlers = handlers

    @contextmanager
    def call(self, request: gr.Request) -> Iterator[str]:
        """Turn errors of splitlearn into one line for the caller. Yields the visitor whose stop signal ends the
        call."""
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
        """`call`, at the head of the queue: Gradio has given this call its turn."""
        stop = self.handlers.stops.signal(visitor(request))
        # A fresh name, since one visitor may make several calls at once.
        with self.call(request) as who, self.handlers.line.turn(uuid4().hex, stop):
            yield who

    def quiet(self, who: str) -> Iterator[str]:
        """Wait until everything is loaded and the runs queued before have ended. Yields what it waits for."""
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
        """Raise SplitlearnError if the caller has left."""
        if self.handlers.stops.signal(who).is_set():
            raise SplitlearnError(ENDED)

    def experiment(self, who: str) -> Iterator[JobStatus]:
        """Follow this call's experiment to its end, and stop it if the caller leaves."""
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
