"""`python -m bench [NAME...]`: run the named measurements, or all of them.

An option sets the size of a measurement whose `main` has a parameter of that name: `python -m bench link_cost --blocks
2`.
"""

import argparse
import inspect
import sys
from importlib import import_module
from pathlib import Path

from splitlearn import config
from splitlearn.arms.runs import Runs
from splitlearn.errors import SplitlearnError
from splitlearn.runtime.progress import on_console
from splitlearn.runtime.terminal import say

BENCHES = (
    "overhead",
    "wire",
    "memory",
    "fidelity",
    "lab",
    "ttft",
    "chaos",
    "chain",
    "fuzz",
    "flooded",
    "capacity",
    "alone",
    "overload",
    "soak",
    "lookup",
    "draft",
    "samples",
    "constrained",
    "schemas",
    "head_overlap",
    "links",
    "link_cost",
    "cuts",
    "plan",
    "overlap",
    "flips",
    "llama",
    "engines",
    "engine_tokens",
    "jax_ladder",
    "threads",
    "context",
    "gpu",
    "start",
    "endpoint",
    "page_cost",
    "users",
    "load_tools",
    "prefix",
    "prefix_tiers",
    "scale",
    "spot_checks",
    "machines",
    "ray",
)
# Options that make a measurement smaller: type, least value and help of each.
SIZES = {
    "blocks": (int, 2, "runs of every arm"),
    "minutes": (float, 0.1, "longest duration"),
    "users": (int, 1, "browsers at once"),
    "chain": (int, 2, "trunk servers one after the other"),
    "ray": (int, 1, "links of trunk servers on Ray, with two replicas each"),
}


def main() -> int:
    """Run the named measurements."""
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(BENCHES)} (default: all)")
    parser.add_argument("--model", metavar="NAME", help="another model than that of config.yaml")
    for name, (kind, _, text) in SIZES.items():
        parser.add_argument(f"--{name}", type=kind, metavar="N", help=f"{text}, for measurements that take it")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in BENCHES]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    size = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    for name, value in size.items():
        if value < SIZES[name][1]:
            parser.error(f"--{name}: {value} is not {SIZES[name][1]} or more")
    status = 0
    for name in args.names or BENCHES:
        try:
            measure = import_module(f"bench.{name}").main
        except ModuleNotFoundError as error:
            parser.error(f"{error.name} is not installed: run `make .venv/installed-bench`")
        for option in size:
            if option not in inspect.signature(measure).parameters:
                parser.error(f"{name} takes no --{option}")
        try:
            with on_console() as progress, Runs(_config(args.model), progress) as runs:
                measure(runs, **size)
        except SplitlearnError as error:  # the others still run: some need what few machines have
            say(f"error: {name}: {error}", stderr=True)
            status = 2
    return status


def _config(model: str | None) -> config.Config:
    """config.yaml, with another model if one is named."""
    here = config.load(Path("config.yaml"))
    return here if model is None else here.model_copy(update={"model": config.ModelConfig(name=model)})


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
