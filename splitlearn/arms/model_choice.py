"""Another model for a program that runs: what can be had, and loading it in the place of the one that is loaded.

    choices(first, runs, probe=True)                       # every model, and why one cannot be had
    load(startup, first, name, progress, stop)             # False when `stop` ended it

The model in use goes on until the other one is here, read and found to fit. If the other one cannot be loaded then, the
one before is used again.
"""

import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from splitlearn.arms.model import Model
from splitlearn.arms.runs import Runs
from splitlearn.arms.startup import POLL_S, Startup
from splitlearn.checkpoints import cache, catalogue, download, folder
from splitlearn.checkpoints.catalogue import ModelStatus
from splitlearn.config import AUTO, Config, SplitConfig
from splitlearn.errors import InputError, SetupError, SplitlearnError
from splitlearn.flags.registry import SIDES
from splitlearn.flags.selection import availability, parse
from splitlearn.runtime import cgroups
from splitlearn.runtime.progress import Progress, Step

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
COPIES = 2
"""Of the weights that are loaded at once at least: in the trunk and the client, or in the trunk and the full model."""
OVERHEAD_BYTES = 200_000_000
"""What the processes take besides weights and shared libraries."""


@dataclass(frozen=True)
class Choice:
    """A model by the name that `load` takes. `why_not` says why it cannot be loaded; empty where nothing is known to
    stand against it."""

    name: str
    status: ModelStatus
    why_not: str = ""


class Ended(SplitlearnError):
    """Somebody stopped the loading."""


def choices(first: Config, runs: Runs, probe: bool) -> list[Choice]:
    """The model of the configuration `first`, then the catalogue, then what else is cached. With `probe` the model hub
    is asked for what would come from there: some seconds."""
    listed = [*_configured(first), *catalogue.catalogue_status(first.model)]
    found: dict[Path | str, Choice] = {}
    for status in listed:
        if status.folder is not None and cache.is_part(status.folder):
            continue  # the page needs whole models
        found.setdefault(status.folder or status.name, Choice(_name(first, status), status))
    have = memory(runs)
    return [replace(choice, why_not=_why_not(choice.status, runs, have, probe)) for choice in found.values()]


def load(startup: Startup, first: Config, name: str, progress: Progress, stop: threading.Event) -> bool:
    """Fetch the model called `name` where it is not here, and load it in the place of the one in use. `first` is the
    configuration that the program began with. False when `stop` ended it before anything was replaced.

    Raises what reading a model raises, and SetupError for one that does not fit into memory or cannot be loaded: the
    model before it is in use then.
    """
    runs, config = startup.runs, settings_for(first, name)

    def show(step: Step) -> None:
        if stop.is_set():
            raise Ended("stopped")
        progress(step)

    try:
        config, model = runs.settled_model(config, show)
        show(Step("Looking at the memory"))
    except SplitlearnError:
        if stop.is_set():
            return False
        raise
    if said := why_no_room(folder.parameters(model.files.folder), runs.dtype, memory(runs)):
        raise SetupError(f"{model.files.name} was not loaded: {said}.")
    _replace(startup, _with_flags(config, model), model, progress)
    return True


def settings_for(first: Config, name: str) -> Config:
    """The configuration `first` for another model: its usual cut or a planned one, no draft model, its own chat
    template."""
    if name == first.model.name:
        return first
    chat = first.generation.chat if isinstance(first.generation.chat, bool) else True
    parts = {
        "model": first.model.model_copy(update={"name": name, "draft": None}),
        "split": AUTO if first.split == AUTO else SplitConfig(),
        "generation": first.generation.model_copy(update={"chat": chat}),
    }
    return first.model_copy(update=parts)


def memory(runs: Runs) -> int:
    """Bytes that another model may take, once the processes of the one in use have ended."""
    return cgroups.available_memory() + sum(map(_held, runs.pids()))


def why_no_room(parameters: int | None, dtype: str, have: int) -> str:
    """Why a model of so many parameters does not fit into `have` bytes of memory; empty where it does, or where its
    size is unknown."""
    need = COPIES * (parameters or 0) * DTYPE_BYTES[dtype] + OVERHEAD_BYTES
    if parameters is None or need <= have:
        return ""
    return (
        f"it takes about {need / 1e9:.1f} GB of memory ({COPIES} copies in {dtype}), and {have / 1e9:.1f} GB can be "
        "had without the model in use"
    )


def _replace(startup: Startup, config: Config, model: Model, progress: Progress) -> None:
    runs = startup.runs
    before = None if startup.failure else (runs.config, runs.model)
    runs.use(config, model)
    if not (failed := _warm(startup, progress)):
        return
    if before is None:
        raise SetupError(f"{model.files.name} could not be loaded. {failed}")
    runs.use(*before)
    _warm(startup, progress)
    name = before[1].files.name
    raise SetupError(f"{model.files.name} could not be loaded, and {name} is in use again. {failed}")


def _warm(startup: Startup, progress: Progress) -> str:
    """Load both arms and the trunk. What went wrong; empty when nothing did."""
    startup.begin(anew=True)
    said, never = "", threading.Event()
    while startup.running and not never.wait(POLL_S):
        now = "; ".join(f"{name}: {part.state}" for name, part in startup.parts().items())
        if now != said:
            progress(Step(f"Loading {startup.runs.files.name} ({now})"))
            said = now
    return " ".join(part.detail for part in startup.parts().values() if part.state == "failed")


def _with_flags(config: Config, model: Model) -> Config:
    """`config` with the flags that hold for `model`: its own, or auto where one of them cannot be applied."""
    try:
        parse(config.flags, availability(dict.fromkeys(SIDES, model.capabilities.place)))
    except InputError:
        return config.model_copy(update={"flags": "auto"})
    return config


def _configured(first: Config) -> Iterator[ModelStatus]:
    """The configured model, where it is here."""
    try:
        files = catalogue.find(first.model)
    except SplitlearnError:  # the page says that anyway
        return
    if files is not None:
        size = sum(path.stat().st_size for path in files.folder.rglob("*") if path.is_file())
        entry = next((entry for entry in catalogue.CATALOGUE if entry.name == first.model.name), None)
        yield ModelStatus(files.name, files.source, entry, files.folder, size, folder.parameters(files.folder))


def _name(first: Config, status: ModelStatus) -> str:
    """The name by which `catalogue.find` finds it: of the catalogue, of the hub, or its folder."""
    if status.name == first.model.name or status.entry is not None or status.folder is None:
        return status.name
    hub, _, repo = status.source.partition("@")[0].partition("hub ")
    from_hub = not hub and status.folder.name == repo.replace("/", "--")
    return repo if from_hub else str(status.folder)


def _why_not(status: ModelStatus, runs: Runs, have: int, probe: bool) -> str:
    if said := why_no_room(status.parameters, runs.dtype, have):
        return said
    if status.folder is not None or status.entry is None:
        return ""
    entry = status.entry
    need = entry.download_bytes + DTYPE_BYTES["float32"] * entry.parameters
    free = _free(catalogue.cache_folder(runs.config.model))
    if free is not None and need > free:
        return f"it takes {need / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are free"
    return download.unavailable(entry.source) if probe else ""


def _free(cache: Path) -> int | None:
    """Bytes that the cache's disk has left; None where that cannot be told."""
    existing = next((path for path in (cache, *cache.parents) if path.is_dir()), None)
    try:
        return None if existing is None else shutil.disk_usage(existing).free
    except OSError:
        return None


def _held(pid: int) -> int:
    """Bytes that a process would give back."""
    try:
        return int(psutil.Process(pid).memory_full_info().uss)
    except psutil.Error:
        return 0
