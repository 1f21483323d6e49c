"""`python -m bench [NAME...]`: run the measurements by name, or all of them.

A measurement's size is an option of this command where its `main` takes it: `python -m bench link_cost --blocks 2`.
"""

import argparse
import inspect
import sys
from importlib import import_module
from pathlib import Path

from splitlearn import config
from splitlearn.arms.runs import Runs
from splitlearn.runtime.progress import on_console

BENCHES = (
    "overhead",
    "wire",
    "memory",
    "fidelity",
    "lab",
    "ttft",
    "chaos",
    "fuzz",
    "flooded",
    "capacity",
    "alone",
    "overload",
    "soak",
    "lookup",
    "draft",
    "samples",
    "head_overlap",
    "links",
    "link_cost",
    "cuts",
    "overlap",
    "flips",
    "llama",
    "threads",
    "context",
    "gpu",
    "start",
    "page_cost",
    "users",
)
# What a measurement may be made smaller by: an option, its type, its least value, and what it says.
SIZES = {
    "blocks": (int, 2, "runs of every arm"),
    "minutes": (float, 0.1, "how long it goes on at most"),
    "users": (int, 1, "browsers at once"),
}


def main() -> int:
    """Run what is named."""
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(BENCHES)} (default: all)")
    for name, (kind, _, said) in SIZES.items():
        parser.add_argument(f"--{name}", type=kind, metavar="N", help=f"{said}, for measurements that take it")
    found = parser.parse_args()
    unknown = [name for name in found.names if name not in BENCHES]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    size = {name: getattr(found, name) for name in SIZES if getattr(found, name) is not None}
    for name, value in size.items():
        if value < SIZES[name][1]:
            parser.error(f"--{name}: {value} is not {SIZES[name][1]} or more")
    for name in found.names or BENCHES:
        measure = import_module(f"bench.{name}").main
        for option in size:
            if option not in inspect.signature(measure).parameters:
                parser.error(f"{name} takes no --{option}")
        with on_console() as progress, Runs(config.load(Path("config.yaml")), progress) as runs:
            measure(runs, **size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
