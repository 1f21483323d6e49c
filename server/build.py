"""From settings to what serves: the checked weights, the stage in memory, its KV pool and its engine."""

import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from server.monitoring.metrics import Metrics
from server.scheduling.admission import Admission
from server.scheduling.calibration import Trial
from server.scheduling.engine import Engine
from splitlearn.checkpoints import catalogue
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.config import Config, ServerConfig
from splitlearn.errors import InputError
from splitlearn.flags.here import here
from splitlearn.flags.registry import SIDES, of_scope
from splitlearn.flags.registry import settings as settings_of
from splitlearn.flags.selection import availability, parse
from splitlearn.kvcache.pool import KVPool, bytes_per_token
from splitlearn.models.plan import SplitPlan
from splitlearn.runtime import cgroups
from splitlearn.runtime.process import default_threads, keep_heap_small
from splitlearn.runtime.progress import Progress, Step
from splitlearn.stages import loading
from splitlearn.stages.cuda_graph import LEAST_WINDOW
from splitlearn.stages.loading import Placement
from splitlearn.stages.local import LocalStage

# Without a budget given: this share of the memory that is free once the weights are loaded.
KV_SHARE = 0.25
# Rows of hidden state that are kept at most for each token of a session: as they came, as computed from, as answered.
ROWS_HELD = 3


@dataclass(frozen=True)
class Served:
    """What this server serves: a model's layers with one set of load and process flags."""

    files: ModelFiles
    plan: SplitPlan
    placement: Placement
    own_flags: frozenset[str]
    threads: int
    load_s: float
    import_rss_bytes: int
    engine: Engine
    admission: Admission
    metrics: Metrics


def build(settings: Config, progress: Progress) -> Served:
    """Load and prepare all. Raises ModelError and InputError for what cannot be served.

    What computes on several threads is led by one thread, here and in the engine: GNU OpenMP keeps a team for each that
    ever led, and where teams have more threads than there are cores, none of them may wait awake (GOMP_SPINCOUNT).
    """
    thread = ThreadPoolExecutor(1, "engine")
    return thread.submit(_build, settings, progress, thread).result()


def _build(settings: Config, progress: Progress, thread: ThreadPoolExecutor) -> Served:
    files = catalogue.prepare(settings.model, progress)
    plan = SplitPlan.of(settings.split.start, settings.split.end, files.n_layers)
    placement = Placement.of(settings.model.device, settings.model.dtype)
    place = here(str(placement.device), settings.model.dtype)
    applied = parse(settings.flags, availability(dict.fromkeys(SIDES, place))).trunk
    own = of_scope(applied, "load", "process")
    progress(Step("Loading the trunk"))
    keep_heap_small()
    at_load = settings_of(own)
    threads = loading.prepare_process(at_load.process, settings.runs.threads or default_threads())
    loaded = loading.load(files, loading.trunk_specs(plan), at_load.load, placement)
    stage, server = loaded.stages[0], settings.server
    admission = Admission(_pool(stage, server), server.max_sessions, server.max_waiting)
    kept = settings_of(applied | {"use_cache"}).session
    trial, metrics = Trial(stage, kept), Metrics()
    gather_s = trial.gather_s() if stage.packs(kept) else None
    # A compiled stage would be compiled anew for each length of a piece.
    prompt_tokens = None if stage.cut.compiled else server.prompt_tokens or trial.prompt_tokens()
    engine = Engine(stage, admission, prompt_tokens, gather_s, metrics, thread)
    loaded_s, imports = loaded.load_s, loaded.import_rss_bytes
    gc.collect()
    gc.freeze()  # what is here stays: a collection that looks through all of it stops every session meanwhile
    return Served(files, plan, placement, own, threads, loaded_s, imports, engine, admission, metrics)


def _pool(stage: LocalStage, server: ServerConfig) -> KVPool:
    """The KV memory that the settings allow. Raises InputError for a budget below one block."""
    recorded = stage.row is not None and stage.row.recorded
    # A recording attends to a window of a session's memory: sessions of like lengths should have like windows.
    tokens = -(-server.kv_block_tokens // LEAST_WINDOW) * LEAST_WINDOW if recorded else server.kv_block_tokens
    block = bytes_per_token(stage.kv_shapes, stage.dtype) * tokens
    if server.kv_bytes is None:
        rows = ROWS_HELD * stage.hidden_size * stage.dtype.itemsize * tokens
        return stage.pool(max(1, int(KV_SHARE * free_bytes(stage.device)) // (block + rows)), tokens)
    if server.kv_bytes < block:
        limit = f"at least {block}, the bytes of a block of {tokens} tokens (server.kv_block_tokens)"
        raise InputError("server.kv_bytes", server.kv_bytes, limit)
    return stage.pool(server.kv_bytes // block, tokens)


def free_bytes(device: torch.device) -> int:
    """Memory that can be had, of the device or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return cgroups.available_memory()
