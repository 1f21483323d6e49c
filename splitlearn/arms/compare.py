"""One prompt through both arms: the comparison, and how it reads as JSON.

Ratios are split / full of one run each, so n = 1: what a flag or a split costs is the lab's question, not this one's.
"""

import random
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from splitlearn.arms.runs import ArmReport, Item, Runs
from splitlearn.events import KINDS as KINDS
from splitlearn.events import GenerationRequest, Kind
from splitlearn.flags.selection import FlagSet
from splitlearn.metrics import UNATTRIBUTED, RunMetrics, first_difference, tps_of_all
from splitlearn.models.plan import SplitPlan
from splitlearn.runtime import hardware

Watch = Callable[[Kind, Item], None]


@dataclass(frozen=True)
class Comparison:
    """Both arms' reports on the same prompt with the same flags."""

    model: str
    plan: SplitPlan
    flags: FlagSet
    full: ArmReport
    split: ArmReport
    environment: dict[str, Any]

    @property
    def first_difference(self) -> tuple[int, int] | None:
        """The first sample in which the arms differ and the index of the first such token id, or None."""
        return first_difference(self.full.samples, self.split.samples)

    def as_json(self) -> dict[str, Any]:
        """The object that `compare --json` prints; docs/command-line.md describes it."""
        differ, prompt = self.first_difference, self.full.texts.prompt
        return {
            "model": self.model,
            "split": {"start": self.plan.start, "end": self.plan.end, "n_layers": self.plan.n_layers},
            "prompt": {
                "text": "".join(text for text, _ in prompt),
                "token_ids": list(self.full.metrics.prompt_ids),
                "control_tokens": [text for text, is_control in prompt if is_control],
            },
            "flags": self.flags.names(),
            "flags_by_side": {
                "full": sorted(self.flags.full),
                "client": sorted(self.flags.client),
                "trunk": sorted(self.flags.trunk),
            },
            "full": arm_as_json(self.full),
            "split_run": arm_as_json(self.split),
            "identical_tokens": differ is None,
            "first_divergence": None if differ is None else differ[1],
            "first_differing_sample": None if differ is None else differ[0],
            "environment": self.environment,
        }


def compare(
    runs: Runs,
    request: GenerationRequest,
    flags: FlagSet,
    watch: Watch = lambda kind, item: None,
    cancelled: threading.Event | None = None,
) -> Comparison | None:
    """Run `request` through both arms, one after the other in random order; None when it was cancelled.

    `watch` sees everything that the arms yield, as it comes.
    """
    reports: dict[Kind, ArmReport] = {}
    for kind in random.sample(KINDS, len(KINDS)):
        for item in runs.stream(kind, flags, request, cancelled):
            watch(kind, item)
            if isinstance(item, ArmReport):
                reports[kind] = item
    if len(reports) < len(KINDS):
        return None
    name = runs.files.name
    return Comparison(name, runs.plan, flags, reports["full"], reports["split"], environment(runs))


def environment(runs: Runs) -> dict[str, Any]:
    """What a reader needs to know of the machine and the software to place the figures."""
    trunk = runs.describe_trunk()
    return {
        **hardware.describe(),
        "device": runs.device,
        "digest": runs.files.digest,
        "trunk": {"device": trunk.device, "threads": trunk.threads, **dict(sorted(trunk.machine.items()))},
    }


def arm_as_json(report: ArmReport) -> dict[str, Any]:
    """One arm's report. Times in seconds, memory and wire in bytes."""
    metrics = report.metrics
    common = {
        "token_ids": list(metrics.token_ids),
        "text": metrics.text,
        "finish_reason": metrics.finish_reason,
        "prompt_tokens": metrics.prompt_tokens,
        "n_tokens": metrics.n_tokens,
        "ttft_s": metrics.ttft_s,
        "tpot_s": metrics.tpot_s,
        "tps": metrics.tps,
        "decode_tps": metrics.decode_tps,
        "e2el_s": metrics.e2el_s,
        "itl_p50_s": metrics.itl_p50_s,
        "drafts": metrics.drafts,
        "drafts_accepted": metrics.drafts_accepted,
        "peak_rss_bytes": report.peak_rss_bytes,
        "import_rss_bytes": report.import_rss_bytes,
        "load_s": report.load_s,
        "compile_s": report.compile_s,
        "dtype": report.dtype,
        "device": report.device,
        "threads": report.threads,
        "ledger": _ledger(metrics),
        "tps_all_samples": tps_of_all(report.samples),
        "other_samples": [_sample_as_json(other) for other in report.others],
    }
    return common if report.trunk is None else {**common, **_trunk_as_json(report)}


def _sample_as_json(metrics: RunMetrics) -> dict[str, Any]:
    return {
        "token_ids": list(metrics.token_ids),
        "text": metrics.text,
        "finish_reason": metrics.finish_reason,
        "n_tokens": metrics.n_tokens,
        "ttft_s": metrics.ttft_s,
        "tpot_s": metrics.tpot_s,
        "e2el_s": metrics.e2el_s,
    }


def _trunk_as_json(report: ArmReport) -> dict[str, Any]:
    metrics, trunk = report.metrics, report.trunk
    return {
        "bytes_up": metrics.bytes_up,
        "bytes_down": metrics.bytes_down,
        "decode_bytes_up": metrics.decode_bytes_up,
        "decode_bytes_down": metrics.decode_bytes_down,
        "overlapped_s": metrics.overlapped_s,
        "head_starts": metrics.head_starts,
        "head_starts_right": metrics.head_starts_right,
        "kv_shipped_bytes": report.kv_shipped_bytes,
        "recoveries": [{"token": token, **asdict(recovery)} for token, recovery in metrics.recoveries],
        "trunk_address": report.trunk_address,
        "trunk_peak_rss_bytes": trunk.peak_rss_bytes if trunk else 0,
        "trunk_import_rss_bytes": trunk.import_rss_bytes if trunk else 0,
        "trunk_load_s": trunk.load_s if trunk else 0.0,
        "trunk_threads": trunk.threads if trunk else 0,
    }


def _ledger(metrics: RunMetrics) -> dict[str, float]:
    rest = {f"{name}_s": spent for name, spent in metrics.ledger.items() if name != UNATTRIBUTED}
    return {**rest, f"{UNATTRIBUTED}_s": metrics.ledger[UNATTRIBUTED]}
