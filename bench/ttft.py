"""How soon the lab decides a small effect on TTFT: an experiment with a flag that makes the prefill 5% longer.

It ends once the verdict on TTFT is decided, and after `minutes` at the latest.
"""

import tempfile
import time
from pathlib import Path
from statistics import fmean

from bench import planted
from bench.lab import TOKENS, experiment
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.lab.analysis.findings import Findings, Row
from splitlearn.lab.design import AA
from splitlearn.lab.experiment import PREFILLS, exclusive

SEED = 11


def main(runs: Runs, minutes: float = 10.0) -> None:
    """Measure and write docs/results/ttft.md."""
    began = time.monotonic()
    with exclusive(runs.config), tempfile.TemporaryDirectory() as folder:
        found = experiment(runs, Path(folder), SEED, "full", [planted.PREFILL], None, minutes, _decided)
    took = time.monotonic() - began
    row, same = _row(found, planted.PREFILL), _row(found, AA)
    text = (
        f"One experiment about a flag that makes the prefill {planted.PREFILL_SHARE:.0%} longer, in the full arm; "
        f"it ends when the verdict on TTFT is decided, and after {minutes:g} minutes at the latest. {TOKENS} tokens a "
        f"run; {PREFILLS} prefills of each arm in a block besides, in turns, of which the quickest counts. Delta 2%."
    )
    figures = {
        "planted": f"{planted.PREFILL_SHARE:.1%}",
        "verdict on TTFT": row.text,
        "with / without": str(row.effect),
        "A/A": str(same.effect),
        "minutes": f"{took / 60:.1f}",
        "others' load, cores": f"{fmean(trial.others_cpu for trial in found.trials):.2f}",
    }
    write("ttft", "How soon an effect on TTFT is decided", text, [figures], environment(runs))


def _decided(findings: Findings) -> bool:
    return _row(findings, planted.PREFILL).decided


def _row(findings: Findings, flag: str) -> Row:
    return next(row for row in findings.rows if row.metric == "ttft_s" and row.question.flag == flag)
