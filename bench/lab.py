"""Check the lab's method on the default model, with flags whose effect is known.

Ten experiments, alternately full and split, measure a flag that does nothing (two byte-identical arms). An eleventh
measures a flag that makes a step 3% longer and one that makes it 0.2% longer. The result is the verdict on each.
`python -m bench ttft` does the same for a longer prefill.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from bench import planted
from bench.report import write
from splitlearn.arms.compare import KINDS, environment
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import Kind
from splitlearn.lab.analysis.findings import Findings, findings_of
from splitlearn.lab.design import AA, plan
from splitlearn.lab.experiment import Experiment, exclusive
from splitlearn.lab.request import ExperimentRequest, setup
from splitlearn.lab.store import Store
from splitlearn.runtime import process

EXPERIMENTS, PAIRS = 10, 40
PLANTED_PAIRS = 150
TOKENS = 16
COMMAND = "python -m bench lab"
APPLIED = "low_cpu_mem_usage,inference_mode,use_cache,output_attentions,output_hidden_states"
NOTHING, *WAITING = planted.PLANTED

process.PRELOAD.append(planted.__name__)


def main(runs: Runs) -> None:
    """Measure and write docs/results/lab.md."""
    with exclusive(runs.config), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        same = [experiment(runs, folder, seed, KINDS[seed % 2], [NOTHING], PAIRS) for seed in range(EXPERIMENTS)]
        apart = experiment(runs, folder, EXPERIMENTS, "full", WAITING, PLANTED_PAIRS)
    text = (
        f"{EXPERIMENTS} experiments of {PAIRS} pairs, half of them in full and half in split, about a flag that does "
        f"nothing, then one of {PLANTED_PAIRS} pairs about two flags that wait for a share of each step. {TOKENS} "
        "tokens a run; delta 2%, each number of pairs fixed before. A verdict is withheld where the experiment's own "
        "A/A interval is wider than delta or does not cover 1."
    )
    verdicts = [_row(same, NOTHING, kind) for kind in KINDS] + [_row([apart], flag, "full") for flag in WAITING]
    write("lab", "What the lab says of flags whose effect is known", text, verdicts, environment(runs))


def experiment(
    runs: Runs,
    folder: Path,
    seed: int,
    kind: Kind,
    about: Sequence[str],
    pairs: int | None,
    minutes: float | None = None,
    enough: Callable[[Findings], bool] = lambda findings: False,
) -> Findings:
    """Measure planted flags in arms of `kind`, for `pairs` pairs, `minutes` minutes, or until `enough(findings)`."""
    sides = {"full": "none", "client": "none", "trunk": "none"}
    applied = f"{APPLIED},{','.join(about)}"
    sides |= {"full": applied} if kind == "full" else {"client": applied, "trunk": APPLIED}
    words = " ".join(f"{side}:{flags}" for side, flags in sides.items())
    made = setup(
        runs, ExperimentRequest(words, pairs=pairs, minutes=minutes, max_new_tokens=TOKENS, seed=seed), COMMAND
    )
    whole = plan("without", made.flags, list(about))
    # Leaves out the question about all flags together: its arm has no KV cache and would take half of the time.
    questions = tuple(each for each in whole.questions if each.flag in (AA, *about))
    named = {name for each in questions for name in (each.treated, each.control)}
    reduced = replace(whole, questions=questions, arms=tuple(arm for arm in whole.arms if arm.name in named))
    with Store.create(folder / f"{seed}.sqlite", replace(made, plan=reduced)) as store:
        for progress in Experiment(runs, store).go():
            print(f"experiment {seed + 1}, {kind}: {progress.phase}", flush=True)
            if enough(progress.findings):
                break
        return findings_of(store)


def _row(found: list[Findings], flag: str, kind: Kind) -> dict[str, str]:
    rows = [row for findings in found for row in findings.rows if row.metric == "tpot_s" and row.question.kind == kind]
    own = [row for row in rows if row.question.flag == flag]
    noise = [row.effect for row in rows if row.question.flag == AA and row.effect]
    counted = Counter(row.verdict for row in own)
    return {
        "flag": flag,
        "arm": kind,
        "planted": f"{planted.PLANTED[flag]:.1%}",
        "TPOT verdicts": ", ".join(f"{verdict}: {count}" for verdict, count in counted.most_common()),
        "ratios": "; ".join(str(row.effect) for row in own),
        "A/A": "; ".join(f"[{effect.low:.3f}, {effect.high:.3f}]" for effect in noise),
    }
