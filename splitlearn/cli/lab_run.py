"""The lab on a terminal: run an experiment, go on with one, show one or two."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Group
from rich.live import Live
from rich.text import Text

from splitlearn.arms.runs import Runs
from splitlearn.cli.lab_table import flags_rows
from splitlearn.config import Config
from splitlearn.lab.analysis.findings import SERVICE, Findings, findings_of
from splitlearn.lab.analysis.flags_table import flags_table
from splitlearn.lab.analysis.pairing import ServiceLevel
from splitlearn.lab.experiment import Experiment, ExperimentProgress, exclusive
from splitlearn.lab.preflight import preflight
from splitlearn.lab.report import data, exports
from splitlearn.lab.request import ExperimentRequest, setup
from splitlearn.lab.store import FILE, FOLDER, Store
from splitlearn.planning.auto import settle
from splitlearn.runtime import programs
from splitlearn.runtime.console import console
from splitlearn.runtime.progress import on_console
from splitlearn.runtime.terminal import say, visible


def run(asked: ExperimentRequest, config: Config, out: Path | None, *, as_json: bool) -> None:
    """Run a new experiment in the folder `out`, and write its exports there."""
    folder = out or Path(FOLDER) / time.strftime("%Y-%m-%d-%H%M%S")
    command = programs.this_command()
    with exclusive(config), on_console() as progress, Runs(config, progress, settle) as runs:
        runs.check_trunk()
        made = setup(runs, asked, command)
        for line in preflight(runs, made).lines():
            say(line, stderr=True)
        with Store.create(folder / FILE, made) as store:
            _go(runs, store)
    _end(folder, as_json)


def resume(folder: Path, config: Config, *, as_json: bool) -> None:
    """Go on with the experiment in `folder`, with its own settings. Raises InputError for another model."""
    with (
        exclusive(config),
        Store.open(folder / FILE, write=True) as store,
        on_console() as progress,
        Runs(config, progress, settle) as runs,
    ):
        runs.check_trunk()
        _go(runs, store)
    _end(folder, as_json)


def show(folders: Sequence[Path], service: ServiceLevel, *, as_json: bool) -> None:
    """One experiment, or two held against each other."""
    found = [_read(folder, service) for folder in folders]
    if len(found) == 2:
        say(exports.compare_two(*found))
    elif as_json:
        say(json.dumps(data.as_json(found[0]), indent=2))
    else:
        _print(found[0], folders[0])
        exports.write_exports(found[0], folders[0])


def _read(folder: Path, service: ServiceLevel = SERVICE) -> Findings:
    with Store.open(folder / FILE) as store:
        return findings_of(store, service)


def _go(runs: Runs, store: Store) -> None:
    """Run to the end, or to the first Ctrl-C, which ends the run that is under way."""
    stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        with _watch() as see:
            for progress in Experiment(runs, store, stop).go():
                see(progress)
    finally:
        signal.signal(signal.SIGINT, before)


def _end(folder: Path, as_json: bool) -> None:
    found = _read(folder)
    if as_json:
        say(json.dumps(data.as_json(found), indent=2))
    else:
        _print(found, folder)
    exports.write_exports(found, folder)  # last, so that a full disk loses no figures


def _print(found: Findings, folder: Path) -> None:
    """The flags table and the check on stdout."""
    ended = f"Ended: {found.finished}." if found.finished else "It has not finished: go on with --resume."
    say(f"{found.setup.model}, design {found.setup.design}, n = {found.blocks} whole blocks. {ended}")
    table = flags_table(found)
    console().print(flags_rows(table.rows))
    console().print(flags_rows(table.controls))
    say(
        "Ratios are of times, the row's to those of all flags (design without) or of the row that lacks the flag: "
        f"above 1 the row is slower. Verdicts are about the flag. Report: {folder / 'report.html'}"
    )


See = Callable[[ExperimentProgress], None]


@contextmanager
def _watch() -> Iterator[See]:
    """Shows progress on stderr: the flags table as it grows on a terminal, a line for each block elsewhere."""
    shown = console(stderr=True)
    if not shown.is_terminal:
        yield _Lines().see
        return
    with Live(console=shown, auto_refresh=False, redirect_stdout=False, vertical_overflow="visible") as live:
        yield lambda progress: live.update(_growing(progress), refresh=True)


def _growing(progress: ExperimentProgress) -> Group:
    lines = [Text(visible(line)) for line in (progress.discarded, f"{_label(progress)} {_left(progress)}") if line]
    return Group(flags_rows(flags_table(progress.findings).rows), *lines)


class _Lines:
    """One plain line for the first pass, each block, and each block that did not count."""

    def __init__(self) -> None:
        self._last = self._discarded = ""

    def see(self, progress: ExperimentProgress) -> None:
        if progress.discarded != self._discarded:
            self._discarded = progress.discarded
            say(progress.discarded, stderr=True)
        stage = progress.phase.partition(",")[0]
        if stage != self._last:
            self._last = stage
            say(f"{_label(progress)} {_left(progress)}".rstrip(), stderr=True)


def _label(progress: ExperimentProgress) -> str:
    return f"{progress.phase} (whole blocks so far: {progress.blocks})"


def _left(progress: ExperimentProgress) -> str:
    if progress.remaining_s is None:
        return ""
    return f"about {max(1, round(progress.remaining_s / 60))} min left" if progress.remaining_s >= 1 else ""
