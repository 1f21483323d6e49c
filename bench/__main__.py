"""`python -m bench [NAME...]`: run the measurements by name, or all of them."""

import argparse
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
)


def main() -> int:
    """Run what is named."""
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(BENCHES)} (default: all)")
    names = parser.parse_args().names or BENCHES
    unknown = [name for name in names if name not in BENCHES]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    for name in names:
        with on_console() as progress, Runs(config.load(Path("config.yaml")), progress) as runs:
            import_module(f"bench.{name}").main(runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
