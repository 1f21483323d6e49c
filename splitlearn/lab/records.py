"""The records of an experiment, as JSON: its `Setup`, and a `Trial` for each run that ended."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from splitlearn.flags.selection import FlagSet
from splitlearn.lab.design import Arm, Design, Plan, Question

if TYPE_CHECKING:
    from splitlearn.arms.runs import ArmReport


@dataclass(frozen=True)
class Setup:
    """The settings of an experiment.

    `pairs` is a fixed number of blocks. With None it goes on until every verdict is decided, or `max_pairs` or
    `minutes` (without warm-up) are reached. A ratio within `delta` of 1 counts as no effect. `environment` is where it
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
class Trial:
    """One run that ended. Times in seconds, memory and wire in bytes.

    A bad `block` runs again under the next `attempt`. `order` is the run's place in its block. `at_s` is the wall time
    (seconds since the epoch) of its end. `ledger` covers the whole run, `decode_ledger` the steps after the first
    token. `bad` is why the run does not count, or "".
    """

    block: int
    attempt: int
    order: int
    arm: str
    at_s: float
    ttft_s: float
    tpot_s: float | None
    itl_s: tuple[float, ...]
    token_ids: tuple[int, ...]
    ledger: dict[str, float]
    decode_ledger: dict[str, float]
    load_s: float
    compile_s: float
    added_bytes: int
    dtype: str
    threads: int
    bytes_up: int
    bytes_down: int
    bad: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Trial":
        """The inverse of `as_json`."""
        return cls(**{**data, "itl_s": tuple(data["itl_s"]), "token_ids": tuple(data["token_ids"])})

    @classmethod
    def of(cls, report: "ArmReport", arm: str, block: int, attempt: int, order: int, at_s: float, bad: str) -> "Trial":
        """The trial of a run's report."""
        metrics, trunk = report.metrics, report.trunk
        return cls(
            block=block,
            attempt=attempt,
            order=order,
            arm=arm,
            at_s=at_s,
            ttft_s=metrics.ttft_s,
            tpot_s=metrics.tpot_s,
            itl_s=metrics.itl_s,
            token_ids=metrics.token_ids,
            ledger=metrics.ledger,
            decode_ledger=metrics.decode_ledger,
            load_s=report.load_s + (trunk.load_s if trunk else 0.0),
            compile_s=report.compile_s,
            added_bytes=report.added_bytes,
            dtype=report.dtype,
            threads=report.threads,
            bytes_up=metrics.bytes_up,
            bytes_down=metrics.bytes_down,
            bad=bad,
        )


def _flags_as_json(flags: FlagSet) -> dict[str, list[str]]:
    return {side: sorted(applied) for side, applied in asdict(flags).items()}


def _flags_from_json(data: dict[str, list[str]]) -> FlagSet:
    return FlagSet(**{side: frozenset(applied) for side, applied in data.items()})
