"""The first loads of a program that answers meanwhile: reads the model, starts the trunk, warms both arms.

    startup = Startup(config)
    startup.begin()           # returns at once
    startup.parts()           # how far each part is, for a line on the page
    startup.wait(stop)        # until all is loaded that can be

Both arms are warmed with the same request, and the trunk with them, so that neither is colder in the first run. What
does not fit into memory is loaded when its turn comes. A part that fails keeps its reason; `begin` tries again.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from splitlearn.arms.runs import Runs
from splitlearn.arms.setup import Settle
from splitlearn.arms.spec import Kind
from splitlearn.config import Config
from splitlearn.errors import as_error
from splitlearn.events import GenerationRequest
from splitlearn.flags.selection import parse
from splitlearn.runtime.progress import Progress, Step, on_console, silent
from splitlearn.runtime.terminal import say

State = Literal["waiting", "loading", "ready", "later", "failed"]
MODEL, TRUNK = "model", "trunk server"
ARMS: Mapping[Kind, str] = {"full": "full arm", "split": "split arm"}
NO_MEMORY = "there is too little memory to keep it beside what is loaded: it is loaded when its turn comes"
NO_TRUNK = "the trunk server is not there"
ANY_PROMPT = "Hello"
POLL_S = 0.05


@dataclass(frozen=True)
class Part:
    """One thing that is loaded. `detail` says how far it is, or why it is not loaded."""

    state: State = "waiting"
    detail: str = ""


class Startup:
    """Loads what `runs` needs for the configured flags, in the background and at most once at a time. `at_once`: also
    what it needs to answer several requests at once. `settle` plans the cut of `split: auto`.
    `configured` are the settings that the program began with."""

    def __init__(self, config: Config, at_once: bool = False, settle: Settle | None = None) -> None:
        self.configured, self.runs, self._at_once = config, Runs(config, self._show, settle), at_once
        self._console: Progress = silent
        self._parts = dict.fromkeys((MODEL, TRUNK, *ARMS.values()), Part())
        self._stop = threading.Event()
        self._beginning = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether something is loaded now."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failure(self) -> str:
        """Why nothing can run: what went wrong with the model; empty while that is not known."""
        model = self._parts[MODEL]
        return model.detail if model.state == "failed" else ""

    def parts(self) -> Mapping[str, Part]:
        """Each part by its name, in the order of loading."""
        return dict(self._parts)

    def settled(self, *names: str) -> bool:
        """Whether these parts are loaded, failed or left for later; whatever they are once nothing is loaded."""
        return not self.running or all(self._parts[name].state not in ("waiting", "loading") for name in names)

    def begin(self, anew: bool = False) -> None:
        """Load what is not loaded. Does nothing while that goes on, and once nothing has failed, unless `anew`: another
        model is to be loaded."""
        with self._beginning:
            failed = any(part.state == "failed" for part in self._parts.values())
            if self._stop.is_set() or self.running or not (failed or anew or self._thread is None):
                return
            self._parts = dict.fromkeys(self._parts, Part())
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def wait(self, stop: threading.Event) -> None:
        """Wait until nothing is loaded any more, `stop` is set or this is closed."""
        while self.running and not self._stop.is_set() and not stop.wait(POLL_S):
            pass

    def close(self) -> None:
        """End what is under way, and close `runs`."""
        self._stop.set()
        self.runs.close()

    def _run(self) -> None:
        with on_console() as self._console:
            if not self._load(MODEL, self._read_model):
                return
            trunk = threading.Thread(target=self._load, args=(TRUNK, self._find_trunk), daemon=True)
            trunk.start()
            self._load(ARMS["full"], partial(self._warm, "full"))
            trunk.join()
            if self._parts[TRUNK].state == "ready":
                self._load(ARMS["split"], partial(self._warm, "split"))
            else:
                self._parts[ARMS["split"]] = Part("failed", NO_TRUNK)
        self._sum_up()

    def _sum_up(self) -> None:
        """One line on the terminal."""
        if all(self._parts[arm].state == "ready" for arm in ARMS.values()):
            say("Both arms are warm.", stderr=True)
        for name, part in self._parts.items():
            if part.state == "later" and not self._stop.is_set():
                say(f"note: {name}: {part.detail}.", stderr=True)

    def _load(self, name: str, load: Callable[[], bool]) -> bool:
        """Whether `load` did it. It gives False for what does not fit beside the rest, and raises what is wrong."""
        if self._stop.is_set():
            return False
        self._parts[name] = Part("loading")
        self._console(Step(f"Loading: {name}"))
        try:
            loaded = load()
        except Exception as error:
            said = str(as_error(error, f"loading the {name}"))
            self._parts[name] = Part("failed", said)
            if not self._stop.is_set():
                say(f"warning: {said} The page stays, and the next comparison tries again.", stderr=True)
            return False
        self._parts[name] = Part("ready") if loaded else Part("later", NO_MEMORY)
        return loaded

    def _read_model(self) -> bool:
        return bool(self.runs.model)

    def _find_trunk(self) -> bool:
        self.runs.check_trunk()
        return True

    def _warm(self, kind: Kind) -> bool:
        """The first tokens of what the page asks for at first."""
        runs, generation = self.runs, self.runs.config.generation
        words = runs.config.flags
        flags = runs.flags(words) if kind == "split" else parse(words, runs.availability_here)
        prompt = generation.prompt if generation.prompt.strip() else ANY_PROMPT
        request = GenerationRequest(prompt, generation.max_new_tokens, generation.chat)
        warm = runs.warm(kind, flags, request, self._stop)
        if warm and self._at_once:  # makes what the first of several requests at once would wait for
            deque(runs.serve(kind, flags, replace(request, max_new_tokens=1), self._stop), maxlen=0)
        return warm

    def _show(self, step: Step) -> None:
        """What reading the model is at."""
        share = f" ({step.done / step.total:.0%})" if step.total else ""
        self._parts[MODEL] = Part("loading", f"{step.label}{share}")
        self._console(step)
