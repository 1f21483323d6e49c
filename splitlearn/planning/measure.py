"""Measures what enters a plan, by a few short runs of the full model and of one split; and cuts that are asked for.

rates = measure_rates(runs, anatomy, flags, short_request(prompt), progress)
run = measure_cut(runs, SplitPlan(4, 26, 30), flags, request, Link())
"""

import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from splitlearn.arms.report import ArmReport
from splitlearn.arms.runs import Runs
from splitlearn.config import Config, with_cut
from splitlearn.errors import InputError
from splitlearn.events import GenerationRequest, Kind
from splitlearn.flags.registry import FLAGS, of_scope
from splitlearn.flags.selection import FlagSet
from splitlearn.link.emulated import Link
from splitlearn.models.plan import SplitPlan
from splitlearn.planning.anatomy import Anatomy
from splitlearn.planning.costs import Rates
from splitlearn.planning.fit import rates_of
from splitlearn.runtime.load import reading
from splitlearn.runtime.progress import Progress, Step, silent

REPEATS = 5
"""Runs of each arm, of which the quickest counts: other programs can only make one slower."""
TOKENS = 32
KEPT, OVERLAP = "prefix_cache", "head_overlap"
Arms = Mapping[str, tuple[Kind, FlagSet]]


@dataclass(frozen=True)
class CutRun:
    """What was measured of one cut: the least of several runs, and the peaks of its processes."""

    start: int
    end: int
    tpot_s: float
    ttft_s: float
    client_memory_bytes: int
    trunk_memory_bytes: int


def short_request(prompt: str) -> GenerationRequest:
    """What the runs answer: always as many tokens."""
    return GenerationRequest(prompt, max_new_tokens=TOKENS, ignore_eos=True)


def arms_of(flags: FlagSet) -> Arms:
    """What is run to find the rates: full and split; the whole model with the client's flags where they differ; the
    split in turn, so that neither side slows the other down, where client and trunk work at once.

    Without kept prefixes: from the second run on, a prompt would take no time.
    """
    flags = flags.without(KEPT)
    whole = frozenset(text for text in flags.client if "full" in FLAGS[text.partition("=")[0]].sides)
    found: dict[str, tuple[Kind, FlagSet]] = {"full": ("full", flags), "split": ("split", flags)}
    if whole != flags.full:
        found["whole"] = ("full", FlagSet(full=whole))
    if (in_turn := flags.without(OVERLAP)) != flags:
        found["in_turn"] = ("split", in_turn)
    return found


def measured_at(runs: Runs) -> SplitPlan:
    """The split that is run: the configured one, or the default where its trunk has few layers and may have more."""
    plan, usual = runs.plan, SplitPlan.of(None, None, runs.plan.n_layers)
    few = 2 * (plan.end - plan.start) < plan.n_layers
    return usual if few and runs.config.trunk.embedded else plan


def check_single(config: Config) -> None:
    """Raise InputError for a chain of trunk servers, whose rates are not those of one."""
    if config.trunk.chain:
        raise InputError("trunk.address", config.trunk.place, "one trunk server or embedded, to predict cuts")


def rates_from(
    runs: Runs, anatomy: Anatomy, flags: FlagSet, plan: SplitPlan, found: Mapping[str, list[ArmReport]]
) -> Rates:
    """The rates of the reports of `arms_of(flags)`. Raises InputError for a chain of trunk servers."""
    check_single(runs.config)
    alike = runs.config.trunk.embedded and of_scope(flags.client, "load") == of_scope(flags.trunk, "load")
    return rates_of(anatomy, found, plan, alike=alike)


def measure_rates(
    runs: Runs,
    anatomy: Anatomy,
    flags: FlagSet,
    request: GenerationRequest,
    progress: Progress,
    cancelled: threading.Event | None = None,
) -> Rates | None:
    """The rates of these machines with these flags, without an emulated link. None when it was cancelled. Raises what
    `Runs.stream` raises.

    The peaks of memory are those of the arms' processes, which long prompts before may have raised.
    """
    check_single(runs.config)
    stop, plan, before = cancelled or threading.Event(), measured_at(runs), reading(None)
    with cut_at(runs, plan) as own:
        found = _repeat(own, arms_of(flags), request, Link(), progress, stop)
        others_cpu = reading(before).others_cpu
    return None if stop.is_set() else replace(rates_from(runs, anatomy, flags, plan, found), others_cpu=others_cpu)


def measure_cut(
    runs: Runs,
    plan: SplitPlan,
    flags: FlagSet,
    request: GenerationRequest,
    link: Link,
    progress: Progress,
    cancelled: threading.Event | None = None,
) -> CutRun | None:
    """One cut over an emulated link. None when it was cancelled. Raises as `Runs.check_cut`."""
    runs.check_cut(plan)
    stop = cancelled or threading.Event()
    with cut_at(runs, plan) as own:
        reports = _repeat(own, {"split": ("split", flags.without(KEPT))}, request, link, progress, stop)["split"]
    return None if stop.is_set() else cut_run(plan, reports)


def cut_run(plan: SplitPlan, reports: list[ArmReport]) -> CutRun:
    """What the runs of one cut showed."""
    return CutRun(
        plan.start,
        plan.end,
        min(report.metrics.tpot_s or 0.0 for report in reports),
        min(report.metrics.ttft_s for report in reports),
        max(report.peak_rss_bytes for report in reports),
        max((report.trunk.peak_rss_bytes for report in reports if report.trunk), default=0),
    )


@contextmanager
def cut_at(runs: Runs, plan: SplitPlan) -> Iterator[Runs]:
    """`runs` for its own plan, and otherwise others of the same settings with this plan, ended in the end."""
    if plan == runs.plan:
        yield runs
        return
    with Runs(with_cut(runs.config, plan.start, plan.end), silent) as own:
        yield own


def _repeat(
    runs: Runs, arms: Arms, request: GenerationRequest, link: Link, progress: Progress, stop: threading.Event
) -> dict[str, list[ArmReport]]:
    """Each arm REPEATS times, in random order each time."""
    reports: dict[str, list[ArmReport]] = {name: [] for name in arms}
    label, done = f"Measuring the cut [{runs.plan.start}, {runs.plan.end})", 0
    for _ in range(REPEATS):
        for name in random.sample(list(arms), len(arms)):
            progress(Step(label, done, REPEATS * len(arms)))
            kind, flags = arms[name]
            items = runs.stream(kind, flags, request, stop, link=link)
            reports[name] += [item for item in items if isinstance(item, ArmReport)]
            done += 1
    progress(Step(label, done, done))
    return reports
