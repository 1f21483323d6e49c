"""An experiment in a thread of this process, so that whoever watches it may go and come back; and those that are kept.

One `Job` runs one experiment at a time, and `experiment.alone` keeps other programs from running another one.
"""

import shlex
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from splitlearn.arms.runs import Runs
from splitlearn.errors import SplitlearnError, as_error
from splitlearn.lab.analysis import findings as analysis_findings
from splitlearn.lab.analysis.findings import Findings
from splitlearn.lab.analysis.pairing import ServiceLevel
from splitlearn.lab.experiment import Experiment, State, alone
from splitlearn.lab.report import exports
from splitlearn.lab.request import Asked, setup
from splitlearn.lab.store import FILE, Store

PROMPTS = "prompts.txt"
CLOSE_TIMEOUT_S = 10.0
# Between two runs, for what follows to be drawn before the next one is timed. The same whether anybody looks or not.
SETTLE_S = 0.15


@dataclass(frozen=True)
class Seen:
    """An experiment of this process at one moment. `findings` is of the whole blocks so far, `ended` "" while it runs,
    then how it ended; `error` says what broke it off."""

    folder: Path
    state: State | None = None
    findings: Findings | None = None
    ended: str = ""
    error: str = ""


@dataclass(frozen=True)
class Kept:
    """An experiment in a folder; `said` tells it from others, `finished` why it ended, None if it can be resumed."""

    folder: Path
    said: str
    finished: str | None


class Job:
    """Runs experiments on `runs`, one at a time, each in a folder of its own below `folder`.

    `options` is what the command line needs beside the experiment's own options to repeat it, such as --config.
    """

    def __init__(self, runs: Runs, folder: Path, options: Sequence[str] = ()) -> None:
        self.runs, self.folder, self._options = runs, folder, tuple(options)
        self._seen: Seen | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._listeners: list[Callable[[], None]] = []

    @property
    def running(self) -> bool:
        """Whether an experiment is being measured now."""
        return self._seen is not None and not self._seen.ended

    @property
    def latest(self) -> Seen | None:
        """The experiment that runs, or the last one that did; None before the first."""
        return self._seen

    def start(self, asked: Asked) -> None:
        """Begin an experiment. Raises InputError for what cannot be asked, SetupError while another one runs."""
        with ExitStack() as held:
            held.enter_context(alone(self.runs.config))
            folder = self.folder / time.strftime("%Y-%m-%d-%H%M%S")
            made = setup(self.runs, asked, self._command(asked, folder))
            store = held.enter_context(Store.create(folder / FILE, made))
            if self._has_own_prompts(asked):
                (folder / PROMPTS).write_text("\n".join(asked.prompts) + "\n", encoding="utf-8")
            self._begin(store, held.pop_all())

    def resume(self, folder: Path) -> None:
        """Go on with the experiment in `folder`. Raises InputError or SetupError where that is not possible."""
        with ExitStack() as held:
            held.enter_context(alone(self.runs.config))
            store = held.enter_context(Store.open(folder / FILE, write=True))
            self._begin(store, held.pop_all())

    def stop(self) -> None:
        """End the experiment after the run that is under way, if there is one; it can be resumed."""
        self._stop.set()

    def close(self) -> None:
        """Stop, and wait until it has."""
        self.stop()
        if self._thread is not None:
            self._thread.join(CLOSE_TIMEOUT_S)

    @contextmanager
    def calling(self, listener: Callable[[], None]) -> Iterator[None]:
        """Inside, `listener` is called, in the experiment's thread, each time that `latest` has changed."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def _begin(self, store: Store, held: ExitStack) -> None:
        """Hand `store`, and what must be given back at the end, to a thread."""
        self._stop = threading.Event()
        self._show(Seen(store.path.parent))
        self._thread = threading.Thread(target=self._work, args=(store, held, self._stop), name="lab", daemon=True)
        self._thread.start()

    def _work(self, store: Store, held: ExitStack, stop: threading.Event) -> None:
        seen = Seen(store.path.parent)
        try:
            with held:
                for state in Experiment(self.runs, store, stop).go():
                    seen = _with(seen, state, store)
                    self._show(seen)
                    time.sleep(SETTLE_S)
                ended, error, findings = store.finished or "stopped", "", analysis_findings.of(store)
                seen = replace(seen, findings=findings)
                exports.write_exports(findings, seen.folder)
        except Exception as problem:  # whatever it is, whoever watches must be told
            ended, error = "broken off", str(as_error(problem, "running the experiment"))
        self._show(replace(seen, ended=ended, error=error))

    def _show(self, seen: Seen) -> None:
        self._seen = seen
        for listener in list(self._listeners):
            listener()

    def _has_own_prompts(self, asked: Asked) -> bool:
        return asked.prompts not in ((), (self.runs.config.generation.prompt,))

    def _command(self, asked: Asked, folder: Path) -> str:
        """What repeats the experiment from the command line."""
        given = {
            "--flags": asked.flags,
            "--design": asked.design,
            "--pairs": asked.pairs,
            "--minutes": asked.minutes,
            "--delta": asked.delta,
            "--max-new-tokens": asked.max_new_tokens,
            "--seed": asked.seed,
            "--prompts": folder / PROMPTS if self._has_own_prompts(asked) else None,
        }
        words = [word for name, value in given.items() if value is not None for word in (name, f"{value}")]
        return shlex.join(["python", "-m", "splitlearn", "bench", *self._options, *words])


def kept(folder: Path) -> list[Kept]:
    """The experiments below `folder`, newest first."""
    folders = [path.parent for path in folder.glob(f"*/{FILE}")]
    return [_kept(each) for each in sorted(folders, key=lambda each: each.name, reverse=True)]


def read(folder: Path, service: ServiceLevel) -> Findings:
    """What the experiment in `folder` has found so far. Raises InputError or SetupError for a file that is no such."""
    with Store.open(folder / FILE) as store:
        return analysis_findings.of(store, service)


def _kept(folder: Path) -> Kept:
    try:
        with Store.open(folder / FILE) as store:
            finished = store.finished
            what = f"{folder.name}: {store.setup.design}"
            model = store.setup.model
    except SplitlearnError as error:
        return Kept(folder, f"{folder.name}: cannot be read ({error})", "cannot be read")
    return Kept(folder, f"{what}; {finished or 'not finished'}; {model}", finished)


def _with(seen: Seen, state: State, store: Store) -> Seen:
    """`seen` gone on to `state`; what was found is looked at again when one more block is whole."""
    if seen.state is None or state.blocks != seen.state.blocks:
        return replace(seen, state=state, findings=analysis_findings.of(store) if state.blocks else None)
    return replace(seen, state=state)
