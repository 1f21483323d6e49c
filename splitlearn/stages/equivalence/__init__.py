"""The proof that a cut is exact, on tiny random copies of an architecture.

`check(config)` is what a loader calls before it cuts a model; `prove(config)` says what was found. The families that
were proven are in proven_families.json beside docs/families.md, both written by `python -m
splitlearn.stages.equivalence`.
"""

from splitlearn.stages.equivalence.compare import Result, prove
from splitlearn.stages.equivalence.proven import allows, check
from splitlearn.stages.equivalence.together import SHARED_FORWARD, STATIC_CACHE

__all__ = ["SHARED_FORWARD", "STATIC_CACHE", "Result", "allows", "check", "prove"]
