"""`auto`: the fastest set of flags that leaves the tokens as they are, by a rule from processor, device and dtype.

A rule names another set than `default` only where that set was measured to be faster and to give the same greedy
tokens (docs/speed.md). No rule names a lossy set.
"""

from collections.abc import Callable
from dataclasses import dataclass

VECTORS = ("avx512", "avx2")
"""Vector instructions with which `fast-float32` was measured."""


@dataclass(frozen=True)
class Rule:
    """`auto` means `preset` where `holds(vector, device, dtype)` is true. `when` is that condition in words."""

    when: str
    preset: str
    holds: Callable[[str | None, str, str], bool]


RULES = (
    Rule(
        "float32 on a CPU with AVX2 or AVX-512",
        "fast-float32",
        lambda vector, device, dtype: (device, dtype) == ("cpu", "float32") and vector in VECTORS,
    ),
    Rule("everywhere else", "default", lambda vector, device, dtype: True),
)


def choose(vector: str | None, device: str, dtype: str) -> Rule:
    """The first rule that holds for weights of `dtype` on `device`. `vector` names the processor's widest vector
    instructions (runtime/hardware.py); None where they are unknown."""
    return next(rule for rule in RULES if rule.holds(vector, device, dtype))
