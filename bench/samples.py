"""Throughput of several samples of a prompt at once, against one alone: full, split on loopback, and split over 50
ms."""

from functools import partial
from statistics import median
from typing import Any

from bench.answer import FAST, report
from bench.lookup import OPEN
from bench.pairs import blocks
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.report import ArmReport
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import Kind
from splitlearn.config import with_link
from splitlearn.events import GenerationRequest
from splitlearn.lab.stats import effect
from splitlearn.link.emulated import Link
from splitlearn.metrics import tps_of_all
from splitlearn.runtime.progress import silent
from splitlearn.sampling import SamplingParams

COUNTS, PAIRS, TOKENS = (1, 2, 4, 8), 12, 32
SAMPLING = SamplingParams(temperature=0.8, top_p=0.95, seed=7)
LINK = Link(rtt_ms=50)


def main(runs: Runs) -> None:
    """Measure and write docs/results/samples.md."""
    rows = _rows(runs, "full", "") + _rows(runs, "split", "loopback")
    with Runs(with_link(runs.config, str(LINK)), silent) as far:
        rows += _rows(far, "split", f"{LINK.summary} round trip")
    text = (
        f"{TOKENS} tokens a sample, temperature {SAMPLING.temperature}, flags `{FAST}` on both sides; as many samples "
        f"at once as named, in random order for each of {PAIRS} prompts. Tokens per second are those of all samples, "
        "until the last token of the last one; the prompt's time is in them. TPOT and TTFT are medians, of all at once "
        "and of one alone. The first sample has the seed of the one alone: its token ids are the same but where sums "
        "that are rounded otherwise change what is drawn."
    )
    write("samples", "Several samples of a prompt at once", text, rows, environment(runs))


def _rows(runs: Runs, kind: Kind, where: str) -> list[dict[str, Any]]:
    blocks(_arms(runs, kind, OPEN[0]), 1)  # warms each number of samples
    found: dict[int, list[ArmReport]] = {count: [] for count in COUNTS}
    for prompt in OPEN[:PAIRS]:
        for count, reports in blocks(_arms(runs, kind, prompt), 1, seed=len(prompt)).items():
            found[int(count)] += reports
    return [_row(found[1], found[count], f"{kind} {where}".strip(), count) for count in COUNTS[1:]]


def _arms(runs: Runs, kind: Kind, prompt: str) -> dict[str, Any]:
    request = partial(GenerationRequest, prompt, max_new_tokens=TOKENS, ignore_eos=True, sampling=SAMPLING)
    flags = runs.flags(FAST)
    return {str(count): partial(report, runs, kind, flags, request(samples=count)) for count in COUNTS}


def _row(alone: list[ArmReport], together: list[ArmReport], arm: str, count: int) -> dict[str, Any]:
    tps_together, tps_alone = ([tps_of_all(each.samples) for each in reports] for reports in (together, alone))
    same = sum(a.metrics.token_ids == b.metrics.token_ids for a, b in zip(alone, together, strict=True))
    return {
        "arm": arm,
        "samples": count,
        "tokens per second of all / of one alone": str(effect(tps_together, tps_alone)),
        "TPOT, ms": f"{_milliseconds(together, 'tpot_s')} / {_milliseconds(alone, 'tpot_s')}",
        "TTFT, ms": f"{_milliseconds(together, 'ttft_s')} / {_milliseconds(alone, 'ttft_s')}",
        "first sample the same": f"{same} of {len(alone)}",
    }


def _milliseconds(reports: list[ArmReport], name: str) -> str:
    return f"{median(getattr(each.metrics, name) for each in reports) * 1e3:.0f}"
