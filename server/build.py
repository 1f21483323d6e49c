"""Builds a trunk from settings: checked weights, the loaded stage, its KV pool and its engine."""

import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from server.monitoring.metrics import Metrics
from server.scheduling.admission import Admission
from server.scheduling.calibration import calibrate
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
from splitlearn.stages.loading import Placement
from splitlearn.stages.local import LocalStage

# Without a configured budget: this share of the memory that is free once the weights are loaded.
KV_SHARE = 0.25
# Rows of hidden state kept at most for each token of a session: as received, as computed from, as answered.
ROWS_HELD = 3


@dataclass(frozen=True)
class TrunkRuntime:
    """What this server runs: a model's layers with one set of load and process flags."""

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


def build(settings: Config, progress: Progress) -> TrunkRuntime:
    """Load and prepare a trunk. Raises ModelError and InputError for what cannot be served.

    One thread, the engine's own, leads everything that computes on several threads. GNU OpenMP keeps a team of threads
    for each thread that ever led, and lets none of them spin where there are more than cores (GOMP_SPINCOUNT).
    """
    thread = ThreadPoolExecutor(1, "engine")
    return thread.submit(_build, settings, progress, thread).result()


def _build(settings: Config, progress: Progress, thread: ThreadPoolExecutor) -> TrunkRuntime:
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
    metrics = Metrics()
    engine = Engine(stage, admission, calibrate(stage, kept, server.prompt_tokens), metrics, thread)
    loaded_s, imports = loaded.load_s, loaded.import_rss_bytes
    gc.collect()
    gc.freeze()  # a collection that looks through all of this would stop every session meanwhile
    return TrunkRuntime(files, plan, placement, own, threads, loaded_s, imports, stage, engine, admission, metrics)


def _pool(stage: LocalStage, server: ServerConfig) -> KVPool:
    """The KV pool within the configured budget. Raises InputError for a budget below one block."""
    tokens = stage.block_tokens(server.kv_block_tokens)
    block = bytes_per_token(stage.kv_shapes, stage.dtype) * tokens
    if server.kv_bytes is None:
        rows = ROWS_HELD * stage.hidden_size * stage.dtype.itemsize * tokens
        return stage.pool(max(1, int(KV_SHARE * free_bytes(stage.device)) // (block + rows)), tokens)
    if server.kv_bytes < block:
        limit = f"at least {block}, the bytes of a block of {tokens} tokens (server.kv_block_tokens)"
        raise InputError("server.kv_bytes", server.kv_bytes, limit)
    return stage.pool(server.kv_bytes // block, tokens)


def free_bytes(device: torch.device) -> int:
    """Free memory of the device, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return cgroups.available_memory()
