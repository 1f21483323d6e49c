"""Peak memory of each arm beyond its imports, each in a fresh process, and the trunk server's over 50 sessions."""

from typing import Any

import psutil

from bench.report import write
from splitlearn.arm import Kind
from splitlearn.compare import environment
from splitlearn.config import Config, RunsConfig
from splitlearn.events import GenerationRequest
from splitlearn.parts import parts
from splitlearn.progress import silent
from splitlearn.runs import ArmReport, Runs
from splitlearn.selection import FlagSet
from splitlearn.wire.codec import DTYPES

SESSIONS = 50
EXACT = "low_cpu_mem_usage,inference_mode,use_cache,output_attentions,output_hidden_states,fast_top_k"
SETS = {
    "default without float32_matmul_precision": EXACT,
    "default": "default",
    "the same without low_cpu_mem_usage": EXACT.replace("low_cpu_mem_usage,", ""),
}
REQUEST = GenerationRequest("What is the capital of France?", max_new_tokens=32, ignore_eos=True)


def main(runs: Runs) -> None:
    """Measure and write docs/results/memory.md."""
    weights = {part.name: part.weight_bytes for part in parts(runs.files, runs.plan, DTYPES[runs.config.model.dtype])}
    rows = [_row(runs.config, name, words, weights) for name, words in SETS.items()]
    early, late = _sessions(runs)
    text = (
        "Peak resident memory (VmHWM) of a fresh worker process minus what it held after its imports, in MB; a prompt "
        f"and 32 tokens. The trunk server's processes together after {SESSIONS} sessions: {late / early:.4f} times "
        f"their resident memory after the first five ({early / 1e6:.1f} MB)."
    )
    write("memory", "Memory of each arm", text, rows, environment(runs))


def _row(config: Config, name: str, words: str, weights: dict[str, int]) -> dict[str, Any]:
    """Fresh processes for each set of flags, the trunk server's too."""
    with Runs(config.model_copy(update={"runs": RunsConfig(warm_workers=1)}), silent) as runs:
        flags = runs.flags(words)
        full, split = (_report(runs, kind, flags) for kind in ("full", "split"))
    whole, client = (report.peak_rss_bytes - report.import_rss_bytes for report in (full, split))
    trunk = split.trunk.peak_rss_bytes - split.trunk.import_rss_bytes if split.trunk else 0
    return {
        "flags": name,
        "full": f"{whole / 1e6:.0f}",
        "full / its weights": f"{whole / weights['full']:.3f}",
        "client": f"{client / 1e6:.0f}",
        "client / full": f"{client / whole:.3f}",
        "trunk": f"{trunk / 1e6:.0f}",
        "trunk / its weights": f"{trunk / weights['trunk']:.3f}",
    }


def _report(runs: Runs, kind: Kind, flags: FlagSet) -> ArmReport:
    return next(item for item in runs.stream(kind, flags, REQUEST) if isinstance(item, ArmReport))


def _sessions(runs: Runs) -> tuple[int, int]:
    """Resident bytes of the trunk server and its engines after five sessions, and after all."""
    flags, seen = runs.flags("default"), list[int]()
    for _ in range(SESSIONS):
        _report(runs, "split", flags)
        seen.append(_trunk_resident())
    return seen[4], seen[-1]


def _trunk_resident() -> int:
    """Resident bytes of this program's embedded trunk server and its children."""
    server = next(child for child in psutil.Process().children() if "server" in child.cmdline())
    return sum(process.memory_info().rss for process in (server, *server.children(recursive=True)))
