"""A load test on a terminal: run it, write its exports, print its figures."""

import json
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import ArmSpec
from splitlearn.config import Config
from splitlearn.generation.tokenizer import Tokens
from splitlearn.loadtest import report
from splitlearn.loadtest.clients import Client, real_clients, replay_clients
from splitlearn.loadtest.driver import drive
from splitlearn.loadtest.plan import LoadTest, check_lengths
from splitlearn.loadtest.recording import recordings_of
from splitlearn.loadtest.report import LoadTestResult
from splitlearn.loadtest.summary import Summary
from splitlearn.reporting.files import make_folder
from splitlearn.runtime.console import PlainTable, console
from splitlearn.runtime.progress import Progress, on_console
from splitlearn.runtime.terminal import say

FOLDER = "loadtest"


def run(asked: LoadTest, config: Config, out: Path | None, *, as_json: bool) -> None:
    """Load the trunk as asked, then write the exports to `out`. Ctrl-C ends it early, with the figures so far."""
    folder = out or Path(FOLDER) / time.strftime("%Y-%m-%d-%H%M%S")
    make_folder(folder)
    with on_console() as progress, Runs(config, progress) as runs, _stop_on_interrupt() as stop:
        found = measure(runs, asked, progress, stop)
    if as_json:
        say(json.dumps(report.as_json(found), indent=2))
    else:
        _print(found)
    report.write_exports(found, folder)  # last, so that a full disk loses no figures
    if not as_json:
        say(f"Report: {folder / 'report.html'}")


def measure(runs: Runs, asked: LoadTest, progress: Progress, stop: threading.Event) -> LoadTestResult:
    """Check what is asked, start the clients, load the trunk. Raises InputError and TrunkError."""
    chat, facts = runs.config.generation.chat, runs.files.facts
    tokens = Tokens.load(runs.files.folder, use_fast=True)
    lengths = tuple(len(tokens.encode(prompt, chat)) for prompt in asked.prompts)
    check_lengths(lengths, asked, facts.context_length)
    runs.check_trunk()
    spec = runs.ready_spec("split", runs.flags(runs.config.flags))
    with clients_for(spec, asked, chat, progress) as clients:
        measured = drive(clients, asked, progress, stop)
    return LoadTestResult(
        load=asked,
        prompt_tokens=lengths,
        measurement=measured,
        summary=Summary.of(measured, asked.levels),
        model=runs.files.name,
        command=shlex.join(["python", "-m", "splitlearn", *sys.argv[1:]]),
        environment=environment(runs),
    )


def clients_for(
    spec: ArmSpec, asked: LoadTest, chat: bool | str, progress: Progress
) -> AbstractContextManager[list[Client]]:
    """The clients: real ones, or ones that replay a recording made now."""
    if not asked.replay:
        return real_clients(spec, asked, chat, progress)
    return replay_clients(spec, asked, recordings_of(asked, spec, chat, progress), progress)


@contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event."""
    stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _print(found: LoadTestResult) -> None:
    """The figures on stdout."""
    say(f"{found.model}: {report.about(found)}")
    heads, *rows = report.times(found.summary)
    table = PlainTable(*heads)
    for row in rows:
        table.add_row(*row)
    console().print(table)
    counts = PlainTable("", "", show_header=False)
    for name, value in report.counts(found):
        counts.add_row(name, value)
    console().print(counts)
    for reason, count in found.summary.reasons.items():
        say(f"{count} times: {reason}")
    for note in report.notes(found.summary):
        say(note)
