"""What is compared runs in random order in each block; the ratios are `splitlearn.lab.stats.effect`'s."""

import random
from collections.abc import Callable, Mapping
from typing import TypeVar

Result = TypeVar("Result")


def blocks(
    arms: Mapping[str, Callable[[], Result]], count: int, seed: int = 0, say: Callable[[str], None] = print
) -> dict[str, list[Result]]:
    """Run every arm once in each of `count` blocks, in an order shuffled anew."""
    order = random.Random(seed)
    found: dict[str, list[Result]] = {name: [] for name in arms}
    for block in range(count):
        for name in order.sample(list(arms), len(arms)):
            found[name].append(arms[name]())
        say(f"block {block + 1} of {count}")
    return found


def warm_blocks(arms: Mapping[str, Callable[[], Result]], count: int) -> dict[str, list[Result]]:
    """`blocks`, after every arm has run once for nothing: what is loaded or compiled at first is not counted."""
    for arm in arms.values():
        arm()
    return blocks(arms, count)
