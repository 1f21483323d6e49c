"""What splitting costs on loopback, and what the decode loop costs against transformers' `generate()`.

Three arms, each in a worker process with the same threads, the same dtype and the same tokens.
"""

from collections.abc import Callable
from pathlib import Path

from bench.pairs import blocks, ratio
from bench.reference import Generated, Reference
from bench.report import write
from splitlearn.arm import Kind
from splitlearn.compare import environment
from splitlearn.events import GenerationRequest
from splitlearn.runs import ArmReport, Runs
from splitlearn.selection import FlagSet

PAIRS = 12
TOKENS = 64
PROMPT = (Path(__file__).parent / "prompts.txt").read_text(encoding="utf-8").splitlines()[0]
# With "medium", float32 products may be computed in bfloat16: that would not be the dtype of the reference.
FLAGS = "low_cpu_mem_usage,inference_mode,use_cache,output_attentions,output_hidden_states,fast_top_k"


def main(runs: Runs) -> None:
    """Measure and write docs/results/overhead.md."""
    flags = runs.flags(FLAGS)
    reference = Reference(runs.spec("full", flags))
    try:
        arms: dict[str, Callable[[], Generated]] = {
            "generate": lambda: reference.run(PROMPT, TOKENS),
            "full": lambda: _run(runs, "full", flags),
            "split": lambda: _run(runs, "split", flags),
        }
        for arm in arms.values():
            arm()
        found = blocks(arms, PAIRS)
    finally:
        reference.stop()
    same = len({run.token_ids for listed in found.values() for run in listed}) == 1
    rows = [
        {
            "ratio": f"{name} / {baseline}",
            **{
                label: str(ratio([getattr(r, key) for r in found[name]], [getattr(r, key) for r in found[baseline]]))
                for label, key in (("TPOT", "tpot_s"), ("TTFT", "ttft_s"))
            },
        }
        for name, baseline in (("split", "full"), ("full", "generate"), ("split", "generate"))
    ]
    text = (
        f"Geometric mean ratios with 95% intervals over {PAIRS} blocks of {TOKENS} tokens, greedy, float32, the three "
        f"arms in random order within each block; flags `{FLAGS}`. "
        f"Token ids of all runs: {'identical' if same else 'NOT identical'}."
    )
    write("overhead", "What splitting costs, and what the decode loop costs", text, rows, environment(runs))


def _run(runs: Runs, kind: Kind, flags: FlagSet) -> Generated:
    request = GenerationRequest(PROMPT, max_new_tokens=TOKENS, ignore_eos=True)
    report = next(item for item in runs.stream(kind, flags, request) if isinstance(item, ArmReport))
    metrics = report.metrics
    return Generated(metrics.token_ids, metrics.ttft_s, metrics.tpot_s or 0.0)
