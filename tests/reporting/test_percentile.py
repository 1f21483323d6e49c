"""Percentiles of a report."""

import numpy as np
import pytest

from splitlearn.errors import InputError
from splitlearn.reporting.percentile import percentile


def test_percentiles_are_given_only_where_there_are_enough_values() -> None:
    values = [float(value) for value in range(1, 369)]
    assert percentile(values[:71], 0.95) is None
    assert percentile(values[:72], 0.95) == pytest.approx(68.45)
    assert percentile(values[:367], 0.99) is None
    assert percentile(values, 0.99) == pytest.approx(np.quantile(values, 0.99))
    assert percentile(values[:5], 0.5) is None and percentile(values[:6], 0.5) == 3.5


def test_a_percentile_beyond_0_and_1_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="percentile"):
        percentile([1.0, 2.0], 95)
