"""What Ray costs one client: its time per token with the trunk server on Ray and with the embedded one.

Ray is not in the way of a token: the client talks to the replica as to any trunk server. What it can cost is the cores
that Ray's own processes take. Three clients in one process generate the same answer, token by token in turn and in
random order, so that each pair of times is from the same moment: at a server on Ray and at two embedded ones. The
second of these shows how much two processes of one program differ.
"""

import random
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import splitlearn
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.config import with_trunk
from splitlearn.events import TokenEvent
from splitlearn.lab.stats import effect
from splitlearn.runtime.progress import silent

FLAGS = "default"
TOKENS = 96
PROMPT = (Path(__file__).parent / "prompts.txt").read_text(encoding="utf-8").splitlines()[0]
ON_RAY, EMBEDDED, AGAIN = "on Ray", "embedded", "embedded, again"
ADDRESSES = {ON_RAY: "ray", EMBEDDED: "embedded", AGAIN: "embedded"}


def main(runs: Runs) -> None:
    """Measure and write docs/results/ray.md."""
    with ExitStack() as stack:
        places = {}
        for name, address in ADDRESSES.items():
            own = stack.enter_context(Runs(with_trunk(runs.config, address), silent))
            (places[name],) = own.hops(own.flags(FLAGS).trunk)[0].addresses
        times, same = _in_turn(runs, places, stack)
        machine = environment(own)
    rows = [
        {
            "what": f"{name} / {baseline}",
            "TPOT, ms": " / ".join(f"{1e3 * median(times[each]):.1f}" for each in (name, baseline)),
            "ratio": str(effect(times[name], times[baseline])),
        }
        for name, baseline in ((ON_RAY, EMBEDDED), (AGAIN, EMBEDDED), (ON_RAY, AGAIN))
    ]
    text = (
        "The split arm with its trunk server on Ray (`trunk.address: ray`, one replica) and embedded, flags "
        f"`{FLAGS}`, greedy, {TOKENS} tokens of each in turn. Medians, and geometric mean ratios with 95% intervals, "
        f"over tokens. The token ids are {'identical' if same else 'NOT identical'}."
    )
    write("ray", "What Ray costs one client", text, rows, machine)


def _in_turn(runs: Runs, places: dict[str, str], stack: ExitStack) -> tuple[dict[str, list[float]], bool]:
    """The seconds of each token but the first at each trunk server, and whether the token ids are the same."""
    model, answers = runs.config.model, {}
    for name, place in places.items():
        stages = splitlearn.load_split(model.name, dtype=model.dtype, device=model.device, trunk=place, flags=FLAGS)
        stack.enter_context(stages)
        answers[name] = splitlearn.generate(stages, PROMPT, max_new_tokens=TOKENS, ignore_eos=True)
    times: dict[str, list[float]] = {name: [] for name in answers}
    ids: dict[str, list[int]] = {name: [] for name in answers}
    order = random.Random(0)
    for _ in range(TOKENS):
        for name in order.sample(list(answers), len(answers)):
            began = time.perf_counter()
            event = next(event for event in answers[name] if isinstance(event, TokenEvent))
            times[name].append(time.perf_counter() - began)
            ids[name] += event.token_ids
    return {name: listed[1:] for name, listed in times.items()}, len({*map(tuple, ids.values())}) == 1
