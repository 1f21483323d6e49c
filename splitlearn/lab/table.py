"""The per-flag table: each applied flag left out, or alone, in both arms, beside "none" and "all".

Every arm of every row runs once in each round, in an order shuffled anew, in a warm worker; the figures of a row are
medians over the rounds. Rows about sampler flags run under seeded sampling, where they act.
"""

import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Literal

import pandas as pd

from splitlearn.arm import Kind
from splitlearn.compare import KINDS
from splitlearn.errors import InputError, SplitlearnError
from splitlearn.events import GenerationRequest
from splitlearn.flags import FLAGS
from splitlearn.metrics import first_divergence
from splitlearn.runs import ArmReport, Runs
from splitlearn.sampling import SamplingParams
from splitlearn.selection import FlagSet

RowKind = Literal["none", "all", "without", "alone"]
AskedKind = Literal["without", "alone"]
# What sampler flags are tried under; a greedy request leaves them nothing to do.
SAMPLED = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, repetition_penalty=1.1, seed=7)
CACHE = "use_cache"


@dataclass(frozen=True)
class Row:
    """One set of flags to try. `flag` is what the row is about, None for "none" and "all".

    `sampled` rows run under seeded sampling: those of flags that act only there, and what they are held against.
    """

    kind: RowKind
    flag: str | None
    flags: FlagSet
    sampled: bool = False

    @property
    def label(self) -> str:
        """How the row is called."""
        what = {"none": "no flags", "all": "all chosen flags", "without": "left out", "alone": "alone"}[self.kind]
        return " ".join(filter(None, (self.flag, what, "(sampling)" if self.sampled else "")))

    def request(self, asked: GenerationRequest) -> GenerationRequest:
        """What the row runs: as asked, to the full length, whatever the tokens are."""
        nothing_to_do = asked.sampling.greedy or asked.sampling.top_k == 0
        sampling = SAMPLED if self.sampled and nothing_to_do else asked.sampling
        return replace(asked, ignore_eos=True, stop=(), sampling=sampling)


@dataclass(frozen=True)
class Snapshot:
    """How far the table is: runs done of all, what ran last, and one line for each row with what is known so far."""

    done: int
    total: int
    label: str
    frame: pd.DataFrame


@dataclass
class _Cell:
    """One arm of one row: its reports, or why it cannot be run."""

    reports: list[ArmReport] = field(default_factory=list)
    failure: str = ""


Cells = dict[tuple["Row", Kind], _Cell]


def rows(flags: FlagSet, kinds: Sequence[AskedKind]) -> list[Row]:
    """The rows for what is applied: none, all, then for each flag those kinds that are asked for."""
    listed: list[Row] = []
    for sampled in (False, True):
        names = [name for name in flags.names() if FLAGS[name].acts_when_sampling == sampled]
        if names or not sampled:
            listed += [Row("none", None, FlagSet(), sampled), Row("all", None, flags, sampled)]
        for name in names:
            alone = flags.only(name) if name == CACHE else flags.only(name, CACHE)
            both = (Row("without", name, flags.without(name), sampled), Row("alone", name, alone, sampled))
            listed += [row for row in both if row.kind in kinds]
    return listed


def measure(
    runs: Runs,
    request: GenerationRequest,
    listed: Sequence[Row],
    repeats: int,
    seed: int = 0,
    cancelled: threading.Event | None = None,
) -> Iterator[Snapshot]:
    """Run every row in both arms `repeats` times; a snapshot after each run. Ends early when `cancelled` is set.

    What fails (a set of flags that the trunk will not serve) says so in its row, is not tried again, and the table goes
    on. Raises InputError for a request that no arm can run.
    """
    stop = cancelled or threading.Event()
    order = random.Random(seed)
    cells: Cells = {(row, kind): _Cell() for row in listed for kind in KINDS}
    done, total = 0, repeats * len(cells)
    yield Snapshot(done, total, "", frame(listed, cells))
    for _ in range(repeats):
        for row, kind in order.sample(list(cells), len(cells)):
            if not cells[row, kind].failure:
                _run(runs, kind, row, row.request(request), cells[row, kind], stop)
            if stop.is_set():
                return
            done += 1
            yield Snapshot(done, total, f"{row.label}, {kind}", frame(listed, cells))


def _run(runs: Runs, kind: Kind, row: Row, request: GenerationRequest, cell: _Cell, stop: threading.Event) -> None:
    """One run of one arm of a row, into its cell."""
    try:
        for item in runs.stream(kind, row.flags, request, stop):
            if isinstance(item, ArmReport) and not stop.is_set():
                cell.reports.append(item)
    except InputError:
        raise
    except SplitlearnError as error:
        cell.failure = f"{kind}: {error}"


def frame(listed: Sequence[Row], cells: Cells) -> pd.DataFrame:
    """One line for each row: medians over its runs. Times in seconds, memory in bytes; empty where nothing ran yet."""
    return pd.DataFrame([_line(row, cells[row, "full"], cells[row, "split"]) for row in listed])


def _line(row: Row, full_cell: _Cell, split_cell: _Cell) -> dict[str, Any]:
    full, split = full_cell.reports, split_cell.reports
    return {
        "row": row.label,
        "kind": row.kind,
        "flag": row.flag or "",
        "repeats": min(len(full), len(split)),
        **_figures("full", full),
        **_figures("split", split),
        "identical_tokens": _identical(full, split),
        "unavailable": " ".join(filter(None, (full_cell.failure, split_cell.failure))),
    }


def _figures(kind: Kind, reports: Sequence[ArmReport]) -> dict[str, float | None]:
    """The medians of one arm; the split arm's load and memory are those of client and trunk together."""
    return {
        f"{kind}_load_s": _median([report.load_s + (report.trunk.load_s if report.trunk else 0) for report in reports]),
        f"{kind}_added_bytes": _median([_added_bytes(report) for report in reports]),
        f"{kind}_ttft_s": _median([report.metrics.ttft_s for report in reports]),
        f"{kind}_tpot_s": _median([report.metrics.tpot_s for report in reports]),
        f"{kind}_tps": _median([report.metrics.tps for report in reports]),
        f"{kind}_compile_s": _median([report.compile_s for report in reports]),
    }


def _added_bytes(report: ArmReport) -> int:
    """Peak memory beyond the imports, of the arm's process and of the trunk's engine process."""
    trunk = report.trunk
    there = trunk.peak_rss_bytes - trunk.import_rss_bytes if trunk else 0
    return report.peak_rss_bytes - report.import_rss_bytes + there


def _identical(full: Sequence[ArmReport], split: Sequence[ArmReport]) -> bool | None:
    """Whether all runs of the row, of both arms, gave the same token ids."""
    if not full or not split:
        return None
    first = full[0].metrics.token_ids
    return all(first_divergence(first, report.metrics.token_ids) is None for report in (*full, *split))


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
