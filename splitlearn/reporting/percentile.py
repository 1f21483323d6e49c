"""A percentile that is given only where there are enough values to bound it."""

from collections.abc import Sequence

import numpy as np

from splitlearn.errors import InputError

TAIL = 0.025  # of a two-sided 95% interval


def percentile(values: Sequence[float], q: float) -> float | None:
    """The `q` quantile (0.95 for p95) of `values`, in their unit; None where they are too few to bound it.

    The two-sided 95% interval of order statistics has to exist: the chance q ** n that all n values lie on one side of
    the quantile is at most 0.025 (David and Nagaraja, Order Statistics, 2003, section 7.1). That is n >= 72 for p95 and
    n >= 368 for p99. Raises InputError unless 0 < q < 1.
    """
    if not 0 < q < 1:
        raise InputError("percentile", q, "a number between 0 and 1")
    return float(np.quantile(values, q)) if max(q, 1 - q) ** len(values) <= TAIL else None
