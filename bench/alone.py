"""What continuous batching costs a client that is alone at a trunk.

Compares one client's TPOT at the project's server with its TPOT at a server that computes each step at once, by itself.
Two processes of one program differ by a percent for as long as they live, by where their weights lie in memory. So both
servers are restarted for each pair. A third server, identical to the second, shows the noise floor.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from statistics import median

from bench.batched import Run
from bench.capacity import FLAGS, LENGTH, STEPS, recorded, with_room
from bench.pairs import blocks
from bench.report import write
from bench.stepping import Trunk, mixed, side_by_side
from bench.unbatched import Unbatched
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.config import Config, ServerConfig
from splitlearn.lab.stats import effect
from splitlearn.runtime.progress import silent

STARTS = 12
RUNS = 4
BATCHING, WITHOUT, AGAIN = "the server", "without batching", "without batching, again"


def main(runs: Runs) -> None:
    """Measure and write docs/results/alone.md."""
    config = with_room(runs.config, ServerConfig(max_sessions=2))
    with Runs(config, silent) as own:
        trunk, machine = recorded(own), environment(own)
    found: dict[str, list[float]] = {name: [] for name in (BATCHING, WITHOUT, AGAIN)}
    for start in range(STARTS):
        for name, listed in _started(config, trunk, seed=start).items():
            found[name].append(median(run.tpot_s for run in listed))
        print(f"start {start + 1} of {STARTS}", flush=True)
    rows = [
        {
            "what": f"{name} / {baseline}",
            "TPOT, ms": " / ".join(f"{median(found[each]) * 1e3:.1f}" for each in (name, baseline)),
            "ratio": str(effect(found[name], found[baseline])),
        }
        for name, baseline in ((BATCHING, WITHOUT), (BATCHING, AGAIN), (AGAIN, WITHOUT))
    ]
    text = (
        f"One client that replays recorded hidden states, {STEPS} steps from {LENGTH} tokens of context on, flags "
        f"`{FLAGS}`. Medians, and geometric mean ratios with 95% intervals, over {STARTS} starts of all three servers; "
        f"a start's figure is the median of {RUNS} runs, in random order. Threads of each server: "
        f"{machine['trunk']['threads']}."
    )
    write("alone", "What a client that is alone pays for continuous batching", text, rows, machine)


def _started(config: Config, trunk: Trunk, seed: int) -> dict[str, list[Run]]:
    """Start the three servers once and run them RUNS times in random order."""
    with Runs(config, silent) as own, ExitStack() as stack:
        addresses = {BATCHING: own.hops(trunk.spec.flags.trunk)[0].addresses}
        for name in (WITHOUT, AGAIN):
            server = Unbatched(config)
            stack.callback(server.stop)
            addresses[name] = (server.address,)
        arms: dict[str, Callable[[], Run]] = {
            name: partial(side_by_side, Trunk(trunk.spec.at(*listed), trunk.states), mixed(1, LENGTH), STEPS)
            for name, listed in addresses.items()
        }
        for arm in arms.values():
            arm()
        return blocks(arms, RUNS, seed, say=lambda text: None)
