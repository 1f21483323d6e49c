"""Published claims about the earlier system, to compare with the measurements here.

A claim about a set of flags is compared with all flags together, and with the flag that it is attributed to. "15%
sooner" means a ratio of 0.85; "500% faster" means six times the speed, a ratio of 1/6.
"""

from dataclasses import dataclass
from typing import Literal

from splitlearn.events import Kind
from splitlearn.lab.analysis.findings import Findings, Metric, Row
from splitlearn.lab.design import ALL, CACHE, Question

STATIC = "cache=static"
COMPILE = "torch_compile"


@dataclass(frozen=True)
class Claim:
    """One published gain: `ratio` is (lowest, highest) treated / control of `metric`; no verdict is about "memory".

    It belongs to the rows of `flags`, if the arm with the flag also has `needs`.
    """

    kinds: tuple[Kind, ...]
    metric: Metric | Literal["memory"]
    flags: tuple[str, ...]
    ratio: tuple[float, float]
    words: str
    needs: str = ""

    @property
    def text(self) -> str:
        """The ratio as text."""
        low, high = self.ratio
        return f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"


BOTH: tuple[Kind, ...] = ("full", "split")
CLAIMS = (
    Claim(("full",), "ttft_s", (ALL,), (0.75, 0.85), "15 to 25% sooner, nine flags together"),
    Claim(
        ("full",), "tpot_s", (ALL, CACHE), (1 / 11, 1 / 6), "500 to 1000% faster with the KV cache, nine flags together"
    ),
    Claim(("split",), "ttft_s", (ALL,), (0.90, 0.95), "5 to 10% sooner, three flags together"),
    Claim(
        ("split",),
        "tpot_s",
        (ALL, CACHE),
        (1 / 11, 1 / 6),
        "500 to 1000% faster with the KV cache, three flags together",
    ),
    Claim(("full",), "memory", (ALL,), (0.60, 0.75), "25 to 40% less memory, nine flags together"),
    Claim(("split",), "memory", (ALL,), (0.85, 0.90), "10 to 15% less memory, three flags together"),
    Claim(BOTH, "tpot_s", ("cache",), (1 / 1.48, 1 / 1.48), "1.48 times, dynamic cache to static cache", STATIC),
    Claim(BOTH, "tpot_s", (COMPILE,), (1 / 8.8, 1 / 8.8), "8.8 times, static cache with JIT", STATIC),
)


def claim(findings: Findings, row: Row) -> str:
    """The claims about `row` as text, or ""."""
    found = [one for one in CLAIMS if one.metric == row.metric and _is_about(one, findings, row.question)]
    return "; ".join(f"{one.text} ({one.words})" for one in found)


def measured(findings: Findings, one: Claim) -> str:
    """The measured ratio for each question that `one` is about, as text, or ""."""
    if one.metric == "memory":
        added = {figures.arm: figures.added_bytes for figures in findings.arms}
        ratios = {
            question.key: added[question.treated] / added[question.control]
            for question in findings.setup.plan.questions
            if _is_about(one, findings, question) and added.get(question.treated) and added.get(question.control)
        }
    else:
        ratios = {
            row.question.key: row.effect.ratio
            for row in findings.rows
            if row.metric == one.metric and row.effect and _is_about(one, findings, row.question)
        }
    return "; ".join(f"{key}: {ratio:.2f}" for key, ratio in ratios.items())


def _is_about(one: Claim, findings: Findings, question: Question) -> bool:
    flags = findings.setup.plan.arm(question.treated).flags
    applied = flags.full if question.kind == "full" else flags.client | flags.trunk
    return question.kind in one.kinds and question.flag in one.flags and (not one.needs or one.needs in applied)
