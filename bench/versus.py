"""`python -m bench.versus [--pairs N] TREE COMMAND...`: compare this checkout with another one, in pairs.

COMMAND is a command of `python -m splitlearn` that prints JSON, such as `compare --flags fast --json`. Each pair runs
it in both trees, in random order, in fresh processes and with this interpreter, after one warm-up run that compiles.
The result is the ratio this / TREE of each time in the JSON: geometric mean with 95% interval. Both runs of a pair must
give the same token ids.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.report import table
from splitlearn.errors import InputError
from splitlearn.lab.stats import effect

HERE = Path(__file__).parents[1]
FIGURES = ("ttft_s", "tpot_s", "tps_system")
IDS = "token_ids"


def main() -> int:
    """Run the pairs and print the table."""
    parser = argparse.ArgumentParser("python -m bench.versus", description=__doc__.partition("\n")[0])
    parser.add_argument("tree", type=Path, help="the other checkout")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what both run, with --json")
    args = parser.parse_args()
    trees = (HERE, args.tree.resolve())
    pairs = list(_pairs(trees, args.command, args.pairs))
    print(table(_rows(pairs)))
    return 0


def _pairs(trees: tuple[Path, Path], command: Sequence[str], count: int) -> Iterator[list[dict[str, Any]]]:
    order = random.Random(0)
    for tree in trees:
        _run(tree, command)
    for number in range(count):
        found = {tree: _run(tree, command) for tree in order.sample(trees, 2)}
        print(f"pair {number + 1} of {count}", file=sys.stderr, flush=True)
        yield [dict(_leaves(found[tree])) for tree in trees]


def _run(tree: Path, command: Sequence[str]) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "splitlearn", *command], cwd=tree, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        raise InputError("command", " ".join(command), f"one that succeeds in {tree} (it ended with {done.returncode})")
    return json.loads(done.stdout)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Figures and token ids by their path in the JSON."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        path = f"{name}.{key}".lstrip(".")
        if key == IDS or (key in FIGURES and inner):
            yield path, inner
        else:
            yield from _leaves(inner, path)


def _rows(pairs: Sequence[list[dict[str, Any]]]) -> list[dict[str, str]]:
    names = [name for name in pairs[0][0] if not name.endswith(IDS)]
    same = all(one.get(name) == other.get(name) for one, other in pairs for name in one if name.endswith(IDS))
    return [
        {
            "figure": name,
            "here / there": str(effect([one[name] for one, _ in pairs], [other[name] for _, other in pairs])),
            "here, median": f"{median(one[name] for one, _ in pairs):.5g}",
            "there, median": f"{median(other[name] for _, other in pairs):.5g}",
            "pairs": str(len(pairs)),
            "token ids": "identical" if same else "NOT identical",
        }
        for name in names
    ]


if __name__ == "__main__":
    sys.exit(main())
