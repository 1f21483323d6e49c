"""A load test on a terminal: run it, write its exports, print its figures."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from splitlearn.loadtest import report
from splitlearn.loadtest.report import LoadTestResult
from splitlearn.reporting.files import make_folder
from splitlearn.runtime.console import PlainTable, console
from splitlearn.runtime.progress import Progress, on_console
from splitlearn.runtime.terminal import say

FOLDER = "loadtest"
Stopping = AbstractContextManager[threading.Event]
"""It is entered when the load begins; the event that it gives ends the load."""
Measure = Callable[[Progress, Stopping], LoadTestResult]


def run(measure: Measure, out: Path | None, *, as_json: bool) -> None:
    """Measure, then write the exports to `out`. Ctrl-C ends the load early, with the figures so far."""
    folder = out or Path(FOLDER) / time.strftime("%Y-%m-%d-%H%M%S")
    make_folder(folder)
    with on_console() as progress:
        found = measure(progress, _stop_on_interrupt())
    if as_json:
        say(json.dumps(report.as_json(found), indent=2))
    else:
        _print(found)
    report.write_exports(found, folder)  # last, so that a full disk loses no figures
    if not as_json:
        say(f"Report: {folder / 'report.html'}")


@contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event. Before and after, it ends the command as any other."""
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
