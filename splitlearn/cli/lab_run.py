"""The lab on a terminal: run an experiment, go on with one, show one or two."""

import json
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, TextColumn

from splitlearn.arms.runs import Runs
from splitlearn.config import Config
from splitlearn.lab.analysis.findings import METRIC_NAMES, SERVICE, Findings, findings_of
from splitlearn.lab.analysis.pairing import ServiceLevel
from splitlearn.lab.experiment import Experiment, ExperimentProgress, exclusive
from splitlearn.lab.report import data, exports
from splitlearn.lab.request import ExperimentRequest, setup
from splitlearn.lab.store import FILE, FOLDER, Store
from splitlearn.runtime.console import PlainTable, bars_on, console, label_column
from splitlearn.runtime.progress import on_console
from splitlearn.runtime.terminal import say, visible


def run(asked: ExperimentRequest, config: Config, out: Path | None, *, as_json: bool) -> None:
    """A new experiment in the folder `out`; its exports lie there when it ends."""
    folder = out or Path(FOLDER) / time.strftime("%Y-%m-%d-%H%M%S")
    command = shlex.join(["python", "-m", "splitlearn", *sys.argv[1:]])
    with exclusive(config), on_console() as progress, Runs(config, progress) as runs:
        runs.check_trunk()
        with Store.create(folder / FILE, setup(runs, asked, command)) as store:
            _go(runs, store)
    _end(folder, as_json)


def resume(folder: Path, config: Config, *, as_json: bool) -> None:
    """Go on with the experiment in `folder`, with its own settings. Raises InputError for another model."""
    with (
        exclusive(config),
        Store.open(folder / FILE, write=True) as store,
        on_console() as progress,
        Runs(config, progress) as runs,
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
            for state in Experiment(runs, store, stop).go():
                see(state)
    finally:
        signal.signal(signal.SIGINT, before)


def _end(folder: Path, as_json: bool) -> None:
    found = _read(folder)
    if as_json:
        say(json.dumps(data.as_json(found), indent=2))
    else:
        _print(found, folder)
    exports.write_exports(found, folder)  # at last: a disk that is full takes no figures with it


def _print(found: Findings, folder: Path) -> None:
    """The verdicts on stdout."""
    ended = found.finished or "It has not finished: go on with --resume"
    say(f"{found.setup.model}, design {found.setup.design}, {found.blocks} pairs. {ended}.")
    table = PlainTable("flag", "arm", "metric", "with / without", "verdict", "pairs")
    for row in found.rows:
        effect = row.effect
        ratio = f"{effect.ratio:.3f} [{effect.low:.3f}, {effect.high:.3f}]" if effect else ""
        table.add_row(
            row.question.flag,
            row.question.kind,
            METRIC_NAMES[row.metric],
            ratio,
            row.text,
            str(effect.pairs) if effect else "",
        )
    console().print(table)
    say(f"Ratios are of times: below 1 the flag makes it faster. Report: {folder / 'report.html'}")


See = Callable[[ExperimentProgress], None]


@contextmanager
def _watch() -> Iterator[See]:
    """Shows states on stderr: a bar with the remaining time on a terminal, a line for each block elsewhere."""
    shown = console(stderr=True)
    if not shown.is_terminal:
        yield _Lines().see
        return
    columns = (label_column(), BarColumn(), TextColumn("{task.fields[left]}", markup=False))
    with bars_on(shown, *columns, auto_refresh=False) as bars:
        task = bars.add_task("starting", total=None, left="")

        def see(state: ExperimentProgress) -> None:
            total = None if state.remaining_s is None else state.elapsed_s + state.remaining_s
            bars.update(
                task, description=visible(_label(state)), completed=state.elapsed_s, total=total, left=_left(state)
            )
            bars.refresh()

        yield see


class _Lines:
    """One plain line for each phase that is not just another arm of the same block."""

    def __init__(self) -> None:
        self._last = ""

    def see(self, state: ExperimentProgress) -> None:
        kind = state.phase.partition(":")[0]
        if kind != self._last:
            self._last = kind
            say(f"{_label(state)} {_left(state)}", stderr=True)


def _label(state: ExperimentProgress) -> str:
    return f"{state.phase} ({state.blocks} pairs so far)"


def _left(state: ExperimentProgress) -> str:
    if state.remaining_s is None:
        return ""
    return f"about {max(1, round(state.remaining_s / 60))} min left" if state.remaining_s >= 1 else ""
