"""Made-up prompts of a given number of words. A word is about a token: each is one in the usual vocabularies."""

import random
from functools import cache

_COMMON = """
the of and to in is that it for was on are as with his they at be this from have or by one had not but what all
were when we there can an your which their said if do will each about how up out them then she many some so
these would other into has more her two like him see time could no make than first been its who now people my
made over did down only way find use may water long little very after words called just where most know
"""
WORDS = tuple(_COMMON.split())
BLOCK = 512
"""Words of a block of a trace (`hash_ids`): what has the same number has the same words."""
_POOL = 1 << 16
_OWN = 6
"""A text's first words are drawn for it alone, so that two texts do not begin alike."""


def words(count: int, key: str) -> str:
    """A text of `count` words; the same for the same `key`."""
    dice = random.Random(key)
    own, first = dice.choices(WORDS, k=_OWN), dice.randrange(_POOL)
    pool = _pool()
    rest = max(0, count - _OWN)
    taken = [*own, *pool[first : first + rest]]
    while len(taken) < count:
        taken += pool[: count - len(taken)]
    return " ".join(taken[:count])


@cache
def _pool() -> tuple[str, ...]:
    return tuple(random.Random("pool").choices(WORDS, k=_POOL))
