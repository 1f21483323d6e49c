"""The records of an experiment, as JSON: its `Setup`, and a `Trial` for each run that ended."""

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from splitlearn.flags.selection import FlagSet
from splitlearn.lab import stats
from splitlearn.lab.design import Arm, Design, Plan, Question

if TYPE_CHECKING:
    from splitlearn.arms.report import ArmReport

# The number of the first pass among the blocks, and why the run of a split arm may not count.
FIRST_PASS = -1
LOST = "the trunk was lost"


@dataclass(frozen=True)
class Setup:
    """The settings of an experiment.

    `pairs` is a fixed number of blocks. With None it goes on until every verdict is decided, or `max_pairs` or
    `minutes` are reached. A ratio within `delta` of 1 counts as no effect. `environment` is where it
    began (`lab/environment.py`); `command` repeats it.
    """

    design: Design
    plan: Plan
    flags: FlagSet
    prompts: tuple[str, ...]
    max_new_tokens: int
    delta: float
    pairs: int | None
    max_pairs: int
    minutes: float | None
    seed: int
    model: str
    command: str
    environment: dict[str, Any] = field(hash=False)

    @property
    def looks(self) -> tuple[int, ...]:
        """The numbers of blocks at which verdicts are taken."""
        return (self.pairs,) if self.pairs else stats.looks(self.max_pairs)

    def as_json(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers."""
        found = asdict(self)
        found["flags"] = _flags_as_json(self.flags)
        found["plan"]["arms"] = [{**asdict(arm), "flags": _flags_as_json(arm.flags)} for arm in self.plan.arms]
        return found

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Setup":
        """The inverse of `as_json`."""
        arms = tuple(Arm(**{**arm, "flags": _flags_from_json(arm["flags"])}) for arm in data["plan"]["arms"])
        questions = tuple(Question(**question) for question in data["plan"]["questions"])
        changed = {
            "plan": Plan(data["plan"]["design"], arms, questions),
            "flags": _flags_from_json(data["flags"]),
            "prompts": tuple(data["prompts"]),
        }
        return cls(**{**data, **changed})


@dataclass(frozen=True)
class Place:
    """Where a run stands in its experiment."""

    block: int
    attempt: int
    order: int
    block_runs: int


@dataclass(frozen=True)
class Load:
    """What else went on in the machine during a run, which ended at `at_s`; see `Trial`."""

    at_s: float
    others_cpu: float
    disturbance: str


@dataclass(frozen=True)
class Trial:
    """One run that ended. Times in seconds, memory and wire in bytes.

    A bad `block` runs again under the next `attempt`. `order` is the run's place in its block, of `block_runs` runs.
    The block FIRST_PASS is no block: its order is fixed, and its runs are shown but decide nothing. `at_s` is the wall
    time (seconds since the epoch) of its end.

    `ttft_s` is the median of `prefills_s`: several runs of one token, and the first token of the run itself. `ledger`
    covers the whole run, `decode_ledger` the steps after the first token. `peak_bytes` is the arm's peak memory, client
    and trunk together; `added_bytes` is without what the imports take. `others_cpu` is how many cores other programs
    and the host of a virtual machine took meanwhile; `disturbance` is what happened to the processor, or "". `bad` is
    why the run does not count, or "".
    """

    block: int
    attempt: int
    order: int
    arm: str
    at_s: float
    block_runs: int
    ttft_s: float
    prefills_s: tuple[float, ...]
    tpot_s: float | None
    itl_s: tuple[float, ...]
    token_ids: tuple[int, ...]
    ledger: dict[str, float]
    decode_ledger: dict[str, float]
    load_s: float
    compile_s: float
    added_bytes: int
    peak_bytes: int
    dtype: str
    threads: int
    bytes_up: int
    bytes_down: int
    others_cpu: float
    disturbance: str
    bad: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Trial":
        """The inverse of `as_json`."""
        lists = {name: tuple(data[name]) for name in ("itl_s", "token_ids", "prefills_s")}
        return cls(**{**data, **lists})

    @classmethod
    def of(cls, report: "ArmReport", prefills_s: tuple[float, ...], arm: str, place: Place, load: Load) -> "Trial":
        """The trial of a run's report; `prefills_s` are the times to the first token of the short runs beside it."""
        metrics, trunk = report.metrics, report.trunk
        prefills_s = (*prefills_s, metrics.ttft_s)
        return cls(
            block=place.block,
            attempt=place.attempt,
            order=place.order,
            arm=arm,
            at_s=load.at_s,
            block_runs=place.block_runs,
            ttft_s=median(prefills_s),
            prefills_s=prefills_s,
            tpot_s=metrics.tpot_s,
            itl_s=metrics.itl_s,
            token_ids=metrics.token_ids,
            ledger=metrics.ledger,
            decode_ledger=metrics.decode_ledger,
            load_s=report.load_s + (trunk.load_s if trunk else 0.0),
            compile_s=report.compile_s,
            added_bytes=report.added_bytes,
            peak_bytes=report.peak_rss_bytes + (trunk.peak_rss_bytes if trunk else 0),
            dtype=report.dtype,
            threads=report.threads,
            bytes_up=metrics.bytes_up,
            bytes_down=metrics.bytes_down,
            others_cpu=load.others_cpu,
            disturbance=load.disturbance,
            bad=LOST if metrics.recoveries else "",
        )


def _flags_as_json(flags: FlagSet) -> dict[str, list[str]]:
    return {side: sorted(applied) for side, applied in asdict(flags).items()}


def _flags_from_json(data: dict[str, list[str]]) -> FlagSet:
    return FlagSet(**{side: frozenset(applied) for side, applied in data.items()})
