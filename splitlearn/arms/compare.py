"""One prompt through both arms, once or several times: the comparison, and how it reads as JSON.

The runs of a pair follow each other, in random order. What a flag or a split costs for sure is the lab's question: here
the ratio has the spread of its pairs, and no verdict.
"""

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from splitlearn.arms.report import ArmReport, Item
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import CandidatesRequest, TokenCandidates
from splitlearn.breakdown import Difference, Ratio, check_pairs
from splitlearn.errors import SplitlearnError
from splitlearn.events import KINDS as KINDS
from splitlearn.events import GenerationRequest, Kind
from splitlearn.flags.selection import FlagSet
from splitlearn.metrics import UNATTRIBUTED, RunMetrics, first_difference, tps_of_all
from splitlearn.models.plan import SplitPlan
from splitlearn.runtime import hardware
from splitlearn.runtime.load import reading
from splitlearn.wire import trunk_pb2 as pb

Watch = Callable[[Kind, Item], None]


@dataclass(frozen=True)
class Divergence:
    """Token `at` of `sample` is the first one (both from 0) in which the two runs of a pair differ."""

    full: ArmReport
    split: ArmReport
    sample: int
    at: int

    @property
    def tokens(self) -> tuple[str | None, str | None]:
        """The text of that token in full and in split; None where the answer has ended before."""
        texts = (report.texts.tokens[self.sample] for report in (self.full, self.split))
        full, split = (listed[self.at] if self.at < len(listed) else None for listed in texts)
        return full, split


@dataclass(frozen=True)
class Pairs:
    """The reports of both arms on the same prompt with the same flags, run for run."""

    full: tuple[ArmReport, ...]
    split: tuple[ArmReport, ...]

    def of(self, kind: Kind) -> tuple[ArmReport, ...]:
        """The reports of one arm."""
        return self.full if kind == "full" else self.split

    def typical(self, kind: Kind) -> ArmReport:
        """The run of that arm whose E2EL is the median (of an even number: the lower one)."""
        ordered = sorted(self.of(kind), key=lambda report: report.metrics.e2el_s)
        return ordered[(len(ordered) - 1) // 2]

    @property
    def counted(self) -> list[tuple[RunMetrics, RunMetrics]]:
        """The metrics of each pair in which no trunk was lost: those that may be divided."""
        pairs = zip(self.full, self.split, strict=True)
        return [(full.metrics, split.metrics) for full, split in pairs if not _recoveries(split)]

    @property
    def ttft(self) -> Ratio | None:
        """TTFT split / full. None where every pair has a recovery in it."""
        return Ratio.of((full.ttft_s, split.ttft_s) for full, split in self.counted)

    @property
    def tpot(self) -> Ratio | None:
        """TPOT split / full. None for answers of one token, too."""
        return Ratio.of((full.tpot_s, split.tpot_s) for full, split in self.counted)

    @property
    def difference(self) -> Difference | None:
        """Where the difference of a token's time comes from. None where there is nothing to compare."""
        counted = self.counted
        return Difference.of([full for full, _ in counted], [split for _, split in counted])

    @property
    def divergence(self) -> Divergence | None:
        """The first pair whose arms have other tokens, and where; None if all have the same."""
        for full, split in zip(self.full, self.split, strict=True):
            found = first_difference(full.samples, split.samples)
            if found is not None:
                return Divergence(full, split, *found)
        return None


@dataclass(frozen=True)
class DivergentLogits:
    """The candidates of both arms for the first token in which they differ. In each, `tokens` are the ids that full and
    split chose there in the pair that diverged."""

    full: TokenCandidates
    split: TokenCandidates
    tokens: tuple[int | None, int | None]

    def of(self, kind: Kind) -> TokenCandidates:
        """The candidates of one arm."""
        return self.full if kind == "full" else self.split

    @property
    def repeatable(self) -> bool:
        """Whether each arm chose the same token when it was run again for its logits."""
        return (self.full.token_id, self.split.token_id) == self.tokens

    def as_json(self) -> dict[str, Any]:
        """Each arm's candidates, highest logit first, and which of them it chose."""
        listed: dict[str, Any] = {
            kind: [{**asdict(each), "chosen": each.token_id == token} for each in self.of(kind).listed]
            for kind, token in zip(KINDS, self.tokens, strict=True)
        }
        return {**listed, "repeatable": self.repeatable}


@dataclass(frozen=True)
class Comparison:
    """`pairs` of one prompt with the same flags. `others_cpu` is what other programs used meanwhile, in cores. `why`
    says why the cut is this one, where it was planned."""

    model: str
    plan: SplitPlan
    flags: FlagSet
    pairs: Pairs
    others_cpu: float
    environment: dict[str, Any]
    logits: DivergentLogits | None = None
    why: str = ""

    @property
    def full(self) -> ArmReport:
        """The full arm's typical run."""
        return self.pairs.typical("full")

    @property
    def split(self) -> ArmReport:
        """The split arm's typical run."""
        return self.pairs.typical("split")

    def as_json(self) -> dict[str, Any]:
        """The object that `compare --json` prints; docs/command-line.md describes it."""
        differ, prompt = self.pairs.divergence, self.full.texts.prompt
        return {
            "model": self.model,
            "split": {**asdict(self.plan), **({"why": self.why} if self.why else {})},
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
            "pairs": len(self.pairs.full),
            "ratios": {"ttft": _ratio(self.pairs.ttft), "tpot": _ratio(self.pairs.tpot)},
            "difference_per_token": _difference(self.pairs.difference),
            "every_run": {kind: [_run(report) for report in self.pairs.of(kind)] for kind in KINDS},
            "other_programs_cores": self.others_cpu,
            "identical_tokens": differ is None,
            "divergence": differ and {"position": differ.at, "sample": differ.sample, **_logits(self.logits)},
            "environment": self.environment,
        }


def turns(pairs: int) -> Iterator[Kind]:
    """Which arm runs next: both of each pair, one after the other in random order. Raises InputError."""
    check_pairs(pairs)
    return (kind for _ in range(pairs) for kind in random.sample(KINDS, len(KINDS)))


def compare(
    runs: Runs,
    request: GenerationRequest,
    flags: FlagSet,
    pairs: int = 1,
    watch: Watch = lambda kind, item: None,
    cancelled: threading.Event | None = None,
) -> Comparison | None:
    """Run `request` through both arms, `pairs` times; None when it was cancelled.

    `watch` sees everything that the arms yield, as it comes. Raises InputError for a number that cannot be used.
    """
    order, before = turns(pairs), reading(None)
    reports: dict[Kind, list[ArmReport]] = {kind: [] for kind in KINDS}
    for kind in order:
        for item in runs.stream(kind, flags, request, cancelled):
            watch(kind, item)
            if isinstance(item, ArmReport):
                reports[kind].append(item)
    if any(len(found) < pairs for found in reports.values()):
        return None
    found = Pairs(tuple(reports["full"]), tuple(reports["split"]))
    others_cpu, logits = reading(before).others_cpu, divergent_logits(runs, request, flags, found, cancelled)
    return Comparison(runs.files.name, runs.plan, flags, found, others_cpu, environment(runs), logits, runs.model.why)


def environment(runs: Runs) -> dict[str, Any]:
    """What a reader needs to know of the machine and the software to place the figures."""
    trunk, *others = runs.describe_trunks()
    after = {"after": {f"[{each.start}, {each.end})": _server(each) for each in others}} if others else {}
    return {
        **hardware.describe(),
        "device": runs.device,
        "digest": runs.files.digest,
        "trunk": {**_server(trunk), **after},
    }


def _server(described: pb.Description) -> dict[str, Any]:
    return {"device": described.device, "threads": described.threads, **dict(sorted(described.machine.items()))}


def arm_as_json(report: ArmReport) -> dict[str, Any]:
    """One arm's report. Times in seconds, memory and wire in bytes."""
    metrics = report.metrics
    common = {
        "token_ids": list(metrics.token_ids),
        "text": metrics.text,
        "finish_reason": metrics.finish_reason,
        "prompt_tokens": metrics.prompt_tokens,
        "cached_tokens": metrics.cached_tokens,
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


def divergent_logits(
    runs: Runs,
    request: GenerationRequest,
    flags: FlagSet,
    pairs: Pairs,
    cancelled: threading.Event | None = None,
) -> DivergentLogits | None:
    """The logits of both arms where `pairs` first differ: each arm runs again as far as that token, when nothing is
    timed any more. None where nothing differs, when it was cancelled, and where an arm can no longer run."""
    differ = pairs.divergence
    if differ is None:
        return None
    ids = [report.samples[differ.sample].token_ids for report in (differ.full, differ.split)]
    full, split = (each[differ.at] if differ.at < len(each) else None for each in ids)
    also = frozenset(token for token in (full, split) if token is not None)
    asked = CandidatesRequest(flags, request, differ.sample, differ.at, also)
    try:
        found = [runs.candidates(kind, asked, cancelled, differ.split.link) for kind in KINDS]
    except SplitlearnError:  # the comparison stands without them
        return None
    return DivergentLogits(found[0], found[1], (full, split)) if all(each.listed for each in found) else None


def _logits(found: DivergentLogits | None) -> dict[str, Any]:
    return {"full": [], "split": [], "repeatable": None} if found is None else found.as_json()


def _ratio(found: Ratio | None) -> dict[str, float] | None:
    return (
        None
        if found is None
        else {"geometric_mean": found.mean, "least": found.least, "most": found.most, "n": found.n}
    )


def _difference(found: Difference | None) -> dict[str, float] | None:
    """Seconds per token, split less full."""
    return None if found is None else {f"{name}_s": spent for name, spent in asdict(found).items()}


def _run(report: ArmReport) -> dict[str, float | None]:
    metrics = report.metrics
    times = {"ttft_s": metrics.ttft_s, "tpot_s": metrics.tpot_s, "e2el_s": metrics.e2el_s}
    return {**times, "recoveries": _recoveries(report), "failed_spot_checks": len(report.spot_checks.mismatches)}


def _recoveries(report: ArmReport) -> int:
    """How often a trunk was lost within the run."""
    return sum(len(sample.recoveries) for sample in report.samples)


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
        "spot_checks": asdict(report.spot_checks),
        "recoveries": [{"token": token, **asdict(recovery)} for token, recovery in metrics.recoveries],
        "trunk_address": report.trunk_address,
        "trunk_peak_rss_bytes": trunk.peak_rss_bytes if trunk else 0,
        "trunk_import_rss_bytes": trunk.import_rss_bytes if trunk else 0,
        "trunk_load_s": trunk.load_s if trunk else 0.0,
        "trunk_threads": trunk.threads if trunk else 0,
        "hops": [_hop(report, number) for number in range(len(report.hops))],
    }


def _hop(report: ArmReport, number: int) -> dict[str, Any]:
    """A server of a chain, and its part of the time breakdown."""
    facts, (layers, ledger) = report.hops[number], list(report.metrics.hops.items())[number]
    parts = {f"{name}_s": spent for name, spent in ledger.items()}
    return {"layers": list(layers), **asdict(facts), "ledger": parts}


def _ledger(metrics: RunMetrics) -> dict[str, float]:
    rest = {f"{name}_s": spent for name, spent in metrics.ledger.items() if name != UNATTRIBUTED}
    return {**rest, f"{UNATTRIBUTED}_s": metrics.ledger[UNATTRIBUTED]}
