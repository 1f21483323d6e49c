"""What Ray costs one client: its TPOT and TTFT with the trunk server on Ray and with the embedded one, in pairs.

Ray is not in the way of a token: the client talks to the replica as to any trunk server. What it can cost is the cores
that Ray's own processes take, and one question to the directory when a session opens. Two processes of one program
differ by a percent for as long as they live, so a second embedded server shows the noise floor.
"""

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from bench.answer import answer
from bench.pairs import warm_blocks
from bench.ratios import both, ratio
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.config import with_trunk
from splitlearn.events import GenerationRequest
from splitlearn.runtime.progress import silent

FLAGS = "default"
TOKENS = 48
PROMPT = (Path(__file__).parent / "prompts.txt").read_text(encoding="utf-8").splitlines()[0]
ON_RAY, EMBEDDED, AGAIN = "on Ray", "embedded", "embedded, again"
ADDRESSES = {ON_RAY: "ray", EMBEDDED: "embedded", AGAIN: "embedded"}


def main(runs: Runs, blocks: int = 12) -> None:
    """Measure and write docs/results/ray.md."""
    request = GenerationRequest(PROMPT, max_new_tokens=TOKENS, ignore_eos=True)
    with ExitStack() as stack:
        arms = {}
        for name, address in ADDRESSES.items():
            own = stack.enter_context(Runs(with_trunk(runs.config, address), silent))
            arms[name] = partial(answer, own, "split", own.flags(FLAGS), request)
        found = warm_blocks(arms, blocks)
        machine = environment(own)
    same = len({run.token_ids for listed in found.values() for run in listed}) == 1
    rows = [
        {
            "what": f"{name} / {baseline}",
            "TPOT, ms": both(found, name, baseline, "tpot_s"),
            "TPOT": ratio(found, name, baseline, "tpot_s"),
            "TTFT, ms": both(found, name, baseline, "ttft_s"),
            "TTFT": ratio(found, name, baseline, "ttft_s"),
        }
        for name, baseline in ((ON_RAY, EMBEDDED), (AGAIN, EMBEDDED))
    ]
    text = (
        f"The split arm with its trunk server on Ray (`trunk.address: ray`, one replica) and embedded, flags `{FLAGS}`, "
        f"{TOKENS} tokens, greedy. Medians, and geometric mean ratios with 95% intervals, over {blocks} blocks in random "
        f"order. The token ids of all runs are {'identical' if same else 'NOT identical'}."
    )
    write("ray", "What Ray costs one client", text, rows, machine)
