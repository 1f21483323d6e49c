"""Equivalence tests: show on tiny random copies of an architecture that a cut of it is exact.

A loader calls `check(config)` before it cuts a model. `prove(config)` runs the test and returns its result. `python -m
splitlearn.stages.equivalence` tests all families, and writes proven_families.json and docs/families.md.
"""

from splitlearn.stages.equivalence.compare import Result, prove
from splitlearn.stages.equivalence.proven import allows, check
from splitlearn.stages.equivalence.together import SHARED_FORWARD, STATIC_CACHE

__all__ = ["SHARED_FORWARD", "STATIC_CACHE", "Result", "allows", "check", "prove"]
