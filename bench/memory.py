"""Peak memory of each arm beyond its imports, in fresh processes; and the trunk server's memory over 50 sessions."""

import multiprocessing
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

import psutil

from bench.report import write
from splitlearn.arms import worker_main
from splitlearn.arms.compare import KINDS, environment
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import ArmEnd, ArmSpec
from splitlearn.client.served import TrunkFacts
from splitlearn.config import Config
from splitlearn.events import GenerationRequest
from splitlearn.lab.environment import trunk_pid
from splitlearn.planning import anatomy
from splitlearn.runtime import environment as process_environment
from splitlearn.runtime import process as runtime_process
from splitlearn.runtime.process import raised
from splitlearn.runtime.progress import silent

SESSIONS = 50
EXACT = "low_cpu_mem_usage,inference_mode,use_cache,output_attentions,output_hidden_states,fast_top_k"
SETS = {
    "default without float32_matmul_precision, cache and weight_prepack": EXACT,
    "default": "default",
    "the first without low_cpu_mem_usage": EXACT.replace("low_cpu_mem_usage,", ""),
}
REQUEST = GenerationRequest("What is the capital of France?", max_new_tokens=32, ignore_eos=True)


def main(runs: Runs) -> None:
    """Measure and write docs/results/memory.md."""
    model = anatomy.read(runs.files, runs.dtype)
    weights = {part.name: part.weight_bytes for part in anatomy.parts_of(model, runs.plan, context=0)}
    rows = [_row(runs.config, name, words, weights) for name, words in SETS.items()]
    early, late = _sessions(runs)
    text = (
        "Peak resident memory (VmHWM) of a fresh worker process, which does its own imports, minus what it held after "
        f"them, in MB; a prompt and 32 tokens. The trunk server's processes together after {SESSIONS} sessions: "
        f"{late / early:.4f} times their resident memory after the first five ({early / 1e6:.1f} MB)."
    )
    write("memory", "Memory of each arm", text, rows, environment(runs))


def _row(config: Config, name: str, words: str, weights: dict[str, int]) -> dict[str, Any]:
    """Measure one set of flags, with a fresh trunk server and fresh workers."""
    with Runs(config, silent) as runs:
        flags = runs.flags(words)
        (whole, _), (client, facts) = (_added(runs.ready_spec(kind, flags)) for kind in KINDS)
    trunk = facts.peak_rss_bytes - facts.import_rss_bytes if facts else 0
    return {
        "flags": name,
        "full": f"{whole / 1e6:.0f}",
        "full / its weights": f"{whole / weights['full']:.3f}",
        "client": f"{client / 1e6:.0f}",
        "client / full": f"{client / whole:.3f}",
        "trunk": f"{trunk / 1e6:.0f}",
        "trunk / its weights": f"{trunk / weights['trunk']:.3f}",
    }


def _added(spec: ArmSpec) -> tuple[int, TrunkFacts | None]:
    """Peak bytes of a worker beyond its imports, and its trunk's facts.

    The worker is spawned and does its own imports. A forked one, as in the app, starts with fewer library pages in
    memory and would seem to add 15 MB more.
    """
    process_environment.set_defaults()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=_work, args=(theirs, spec), daemon=True)
    worker.start()
    try:
        ready = raised(ours.recv())
        ours.send((spec.flags, REQUEST))
        while not isinstance(end := raised(ours.recv()), ArmEnd):
            pass
    finally:
        worker.kill()
    return end.peak_rss_bytes - ready.import_rss_bytes, end.trunk


def _work(connection: Connection, spec: ArmSpec) -> None:
    for name in runtime_process.PRELOAD:
        import_module(name)
    worker_main.work(connection, spec)


def _sessions(runs: Runs) -> tuple[int, int]:
    """Resident bytes of the trunk server and its engines after five sessions, and after all."""
    flags, resident = runs.flags("default"), list[int]()
    for _ in range(SESSIONS):
        list(runs.stream("split", flags, REQUEST))
        resident.append(_trunk_resident(runs))
    return resident[4], resident[-1]


def _trunk_resident(runs: Runs) -> int:
    """Resident bytes of the embedded trunk server and its children."""
    server = psutil.Process(trunk_pid(runs.trunk_address()))
    return sum(process.memory_info().rss for process in (server, *server.children(recursive=True)))
