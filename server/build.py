"""Builds a trunk from settings: checks and loads the weights, then makes the stage, its KV pool and its engine."""

import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from server.monitoring.metrics import Metrics
from server.prefixes import TrunkPrefixes
from splitlearn.checkpoints import catalogue
from splitlearn.checkpoints.folder import ModelFiles, read_config
from splitlearn.config import Config, SplitConfig
from splitlearn.flags.here import here
from splitlearn.flags.registry import SIDES, of_scope
from splitlearn.flags.registry import settings as settings_of
from splitlearn.flags.selection import availability, parse
from splitlearn.kvcache.prefix_files import store_of
from splitlearn.models.part import Part
from splitlearn.models.plan import SplitPlan
from splitlearn.runtime.process import default_threads, keep_heap_small, peak_resident_bytes
from splitlearn.runtime.progress import Progress, Step
from splitlearn.scheduling.admission import Admission
from splitlearn.scheduling.calibration import calibrate
from splitlearn.scheduling.engine import Engine
from splitlearn.scheduling.room import pools
from splitlearn.stages import loading
from splitlearn.stages.loading import Placement
from splitlearn.stages.local import LocalStage


@dataclass(frozen=True)
class TrunkRuntime:
    """A loaded trunk: a model's layers with one set of load and process flags, and what serves them."""

    files: ModelFiles
    plan: SplitPlan
    placement: Placement
    own_flags: frozenset[str]
    threads: int
    load_s: float
    import_rss_bytes: int
    stage: LocalStage
    engine: Engine
    admission: Admission
    metrics: Metrics
    prefixes: TrunkPrefixes
    weight_memory_bytes: int


def build(settings: Config, progress: Progress) -> TrunkRuntime:
    """Load and prepare a trunk. Raises ModelError or InputError for a model or settings that cannot be served.

    The engine's thread also loads, since only one thread may lead parallel work. GNU OpenMP keeps a team of threads for
    each thread that ever led one. With more threads than cores it lets none of them spin (GOMP_SPINCOUNT).
    """
    thread = ThreadPoolExecutor(1, "engine")
    return thread.submit(_build, settings, progress, thread).result()


def _build(settings: Config, progress: Progress, thread: ThreadPoolExecutor) -> TrunkRuntime:
    files = catalogue.prepare(settings.model, progress, part=partial(_part, settings.cut))
    plan = _plan(settings.cut, files)
    placement = Placement.of(settings.model.device, settings.model.dtype)
    place = here(str(placement.device), settings.model.dtype, read_config(files.folder))
    applied = parse(settings.flags, availability(dict.fromkeys(SIDES, place))).trunk
    own = of_scope(applied, "load", "process")
    progress(Step("Loading the trunk"))
    keep_heap_small()
    at_load = settings_of(own)
    threads = loading.prepare_process(at_load.process, settings.runs.threads or default_threads())
    loaded = loading.load(files, loading.trunk_specs(plan), at_load.load, placement)
    weights = _memory_of_weights(placement, loaded.import_rss_bytes)
    stage, server = loaded.stages[0], settings.server
    (pool,) = pools([stage], server.kv_bytes, server.kv_block_tokens, "server.kv_bytes")
    admission = Admission(pool, server.max_sessions, server.max_waiting)
    session_settings = settings_of(applied | {"use_cache"}).session
    metrics = Metrics()
    engine = Engine(stage, admission, calibrate(stage, session_settings, server.prompt_tokens), metrics.forward, thread)
    loaded_s, imports = loaded.load_s, loaded.import_rss_bytes
    gc.collect()
    gc.freeze()  # a collection over all these objects would pause every session
    context = repr((files.digest, plan, str(placement.device), str(placement.dtype), sorted(own))).encode()
    store = store_of(catalogue.with_folder(settings.prefix_cache, settings.model), placement.device, context)
    prefixes = TrunkPrefixes(engine, store, context)
    return TrunkRuntime(
        files, plan, placement, own, threads, loaded_s, imports, stage, engine, admission, metrics, prefixes, weights
    )


def _memory_of_weights(placement: Placement, import_rss_bytes: int) -> int:
    """What loading took at most of the device's memory."""
    if placement.device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(placement.device))
    return max(0, peak_resident_bytes() - import_rss_bytes)


def _part(split: SplitConfig, n_layers: int) -> Part:
    """What this server needs of a model with so many layers."""
    return Part.of_trunk(SplitPlan.of(split.start, split.end, n_layers))


def _plan(split: SplitConfig, files: ModelFiles) -> SplitPlan:
    """The layers that the settings name; if they name none, all that a slice of the model has."""
    if files.part is not None and split == SplitConfig():
        return SplitPlan(*files.part.layers[0], files.n_layers)
    return SplitPlan.of(split.start, split.end, files.n_layers)
