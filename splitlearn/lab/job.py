"""Runs an experiment in a thread of this process, so that a page may close and come back, and lists saved ones.

A `Job` runs one experiment at a time; `experiment.exclusive` keeps other programs from running another one.
"""

import shlex
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from splitlearn.arms.runs import Runs
from splitlearn.errors import SplitlearnError, as_error
from splitlearn.lab.analysis.findings import Findings, findings_of
from splitlearn.lab.analysis.pairing import ServiceLevel
from splitlearn.lab.experiment import Experiment, ExperimentProgress, exclusive
from splitlearn.lab.preflight import Preflight, preflight
from splitlearn.lab.report import exports
from splitlearn.lab.request import ExperimentRequest, setup
from splitlearn.lab.store import FILE, Store
from splitlearn.runtime import programs
from splitlearn.runtime.background import Background

PROMPTS = "prompts.txt"
# A pause between two runs, in which the page can draw. It is the same whether anybody looks or not.
SETTLE_S = 0.15


@dataclass(frozen=True)
class JobStatus:
    """An experiment of this process at one moment.

    `findings` covers the runs so far; `flags_table(findings)` is its view. `ended` is "" while it runs,
    then how it ended. `error` is why it broke off.
    """

    folder: Path
    progress: ExperimentProgress | None = None
    findings: Findings | None = None
    ended: str = ""
    error: str = ""


@dataclass(frozen=True)
class SavedExperiment:
    """An experiment in a folder. `label` is for lists; `finished` is why it ended, None if it can be resumed."""

    folder: Path
    label: str
    finished: str | None


class Job(Background[JobStatus]):
    """Runs experiments on `runs`, one at a time, each in a folder of its own below `folder`. One that is stopped ends
    after its current run, and can be resumed.

    `options` are further options of the command that repeats an experiment, such as --config.
    """

    def __init__(self, runs: Runs, folder: Path, options: Sequence[str] = ()) -> None:
        super().__init__()
        self.runs, self.folder, self._options = runs, folder, tuple(options)

    def preflight(self, request: ExperimentRequest) -> Preflight:
        """What the experiment would take; looks for a second how busy the machine is. Raises as `start`."""
        return preflight(self.runs, setup(self.runs, request, ""))

    def start(self, request: ExperimentRequest) -> None:
        """Begin an experiment. Raises InputError for an impossible request, SetupError while another one runs."""
        with ExitStack() as held:
            held.enter_context(exclusive(self.runs.config))
            folder = self.folder / time.strftime("%Y-%m-%d-%H%M%S")
            made = setup(self.runs, request, self._command(request, folder))
            store = held.enter_context(Store.create(folder / FILE, made))
            if self._has_own_prompts(request):
                (folder / PROMPTS).write_text("\n".join(request.prompts) + "\n", encoding="utf-8")
            self._begin(store, held.pop_all())

    def resume(self, folder: Path) -> None:
        """Continue the experiment in `folder`. Raises InputError or SetupError if that is impossible."""
        with ExitStack() as held:
            held.enter_context(exclusive(self.runs.config))
            store = held.enter_context(Store.open(folder / FILE, write=True))
            self._begin(store, held.pop_all())

    def _begin(self, store: Store, held: ExitStack) -> None:
        """Run the experiment in a thread, which closes `held` at the end."""
        self.begin(JobStatus(store.path.parent), lambda stop: self._work(store, held, stop), "lab")

    def _work(self, store: Store, held: ExitStack, stop: threading.Event) -> Iterator[JobStatus]:
        status = JobStatus(store.path.parent)
        try:
            with held:
                for progress in Experiment(self.runs, store, stop).go():
                    status = replace(status, progress=progress, findings=progress.findings)
                    yield status
                    time.sleep(SETTLE_S)
                ended, error, findings = store.finished or "stopped", "", findings_of(store)
                status = replace(status, findings=findings)
                exports.write_exports(findings, status.folder)
        except Exception as problem:  # any error must reach the page
            ended, error = "broken off", str(as_error(problem, "running the experiment"))
        yield replace(status, ended=ended, error=error)

    def _has_own_prompts(self, request: ExperimentRequest) -> bool:
        return request.prompts not in ((), (self.runs.config.generation.prompt,))

    def _command(self, request: ExperimentRequest, folder: Path) -> str:
        """The command that repeats the experiment."""
        given = {
            "--flags": request.flags,
            "--about": ",".join(request.about) or None,
            "--design": request.design,
            "--pairs": request.pairs,
            "--minutes": request.minutes,
            "--delta": request.delta,
            "--max-new-tokens": request.max_new_tokens,
            "--seed": request.seed,
            "--prompts": folder / PROMPTS if self._has_own_prompts(request) else None,
        }
        words = [word for name, value in given.items() if value is not None for word in (name, f"{value}")]
        return shlex.join([programs.spoken(), "-m", "splitlearn", "lab", *self._options, *words])


def saved_experiments(folder: Path) -> list[SavedExperiment]:
    """The experiments below `folder`, newest first."""
    folders = [path.parent for path in folder.glob(f"*/{FILE}")]
    return [_saved(each) for each in sorted(folders, key=lambda each: each.name, reverse=True)]


def read_experiment(folder: Path, service: ServiceLevel) -> Findings:
    """The findings so far of the experiment in `folder`. Raises InputError or SetupError for an unusable file."""
    with Store.open(folder / FILE) as store:
        return findings_of(store, service)


def _saved(folder: Path) -> SavedExperiment:
    try:
        with Store.open(folder / FILE) as store:
            finished = store.finished
            what = f"{folder.name}: {store.setup.design}"
            model = store.setup.model
    except SplitlearnError as error:
        return SavedExperiment(folder, f"{folder.name}: cannot be read ({error})", "cannot be read")
    return SavedExperiment(folder, f"{what}; {finished or 'not finished'}; {model}", finished)
