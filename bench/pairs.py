"""Run arms in blocks, each in random order. `splitlearn.lab.stats.effect` makes the ratios."""

import random
from collections.abc import Callable, Mapping
from typing import TypeVar

Result = TypeVar("Result")


def blocks(
    arms: Mapping[str, Callable[[], Result]], count: int, seed: int = 0, say: Callable[[str], None] = print
) -> dict[str, list[Result]]:
    """Run every arm once in each of `count` blocks, in random order."""
    order = random.Random(seed)
    found: dict[str, list[Result]] = {name: [] for name in arms}
    for block in range(count):
        for name in order.sample(list(arms), len(arms)):
            found[name].append(arms[name]())
        say(f"block {block + 1} of {count}")
    return found


def warm_blocks(arms: Mapping[str, Callable[[], Result]], count: int) -> dict[str, list[Result]]:
    """`blocks` after one uncounted run of every arm, which loads and compiles."""
    for arm in arms.values():
        arm()
    return blocks(arms, count)
