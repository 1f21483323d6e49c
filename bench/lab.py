"""The lab's method on the default model: experiments about flags whose effect is known.

Each experiment asks about one flag that does nothing (two byte-identical arms), one that makes a step 3% longer and one
that makes it 0.2% longer; how often each is called what it is, is the result.
"""

import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

from bench import planted
from bench.report import write
from splitlearn import process
from splitlearn.compare import environment
from splitlearn.lab import analysis
from splitlearn.lab.asking import Asked, setup
from splitlearn.lab.design import AA, plan
from splitlearn.lab.experiment import Experiment, alone
from splitlearn.lab.store import Store
from splitlearn.runs import Runs

EXPERIMENTS = 10
TOKENS = 16
MINUTES = 4.0
COMMAND = "python -m bench lab"
APPLIED = "low_cpu_mem_usage,inference_mode,use_cache,output_attentions,output_hidden_states"

process.PRELOAD.append(planted.__name__)


def main(runs: Runs) -> None:
    """Measure and write docs/results/lab-method.md."""
    with alone(runs.config), tempfile.TemporaryDirectory() as folder:
        found = [_experiment(runs, Path(folder) / f"{seed}.sqlite", seed) for seed in range(EXPERIMENTS)]
    rows = [_row(found, flag, share) for flag, share in planted.PLANTED.items()]
    rows.append({"flag": AA, "planted": "0", "TPOT verdicts": _count(found, AA), "ratios": _ratios(found, AA)})
    text = (
        f"{EXPERIMENTS} experiments on the full model, {TOKENS} tokens a run, each until every verdict was decided or "
        f"{MINUTES:g} minutes were over; delta 2%. A verdict is withheld where the experiment's own A/A interval is "
        "wider than delta or does not cover 1."
    )
    write("lab-method", "What the lab says of flags whose effect is known", text, rows, environment(runs))


def _experiment(runs: Runs, path: Path, seed: int) -> analysis.Findings:
    words = f"full:{APPLIED},{','.join(planted.PLANTED)} client:none trunk:none"
    asked = setup(runs, Asked(words, minutes=MINUTES, max_new_tokens=TOKENS, seed=seed), COMMAND)
    asked = replace(asked, plan=plan("without", asked.flags, list(planted.PLANTED)))
    with Store.create(path, asked) as store:
        for state in Experiment(runs, store).go():
            print(f"experiment {seed + 1}: {state.phase}", flush=True)
        return analysis.of(store)


def _row(found: list[analysis.Findings], flag: str, share: float) -> dict[str, str]:
    return {
        "flag": flag,
        "planted": f"{share:.1%}",
        "TPOT verdicts": _count(found, flag),
        "ratios": _ratios(found, flag),
    }


def _tpot(findings: analysis.Findings, flag: str) -> analysis.Row:
    return next(row for row in findings.rows if row.question.flag == flag and row.metric == "tpot_s")


def _count(found: list[analysis.Findings], flag: str) -> str:
    counted = Counter(_tpot(findings, flag).verdict for findings in found)
    return ", ".join(f"{verdict}: {count}" for verdict, count in counted.most_common())


def _ratios(found: list[analysis.Findings], flag: str) -> str:
    effects = [_tpot(findings, flag).effect for findings in found]
    return "; ".join(str(effect) for effect in effects if effect)
