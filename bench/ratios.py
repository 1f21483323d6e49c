"""Cells of a table that compares arms. `found` has each arm's runs by its name, in the order of the blocks."""

from collections.abc import Mapping, Sequence
from statistics import median

from bench.reference import Generated
from splitlearn.lab.stats import effect
from splitlearn.metrics import first_divergence

Found = Mapping[str, Sequence[Generated]]


def both(found: Found, name: str, baseline: str, key: str) -> str:
    """The medians of `tpot_s` or `ttft_s` in milliseconds, the baseline's last."""
    return " / ".join(f"{1e3 * median(getattr(run, key) for run in found[arm]):.2f}" for arm in (name, baseline))


def ratio(found: Found, name: str, baseline: str, key: str) -> str:
    """The geometric mean ratio with its interval."""
    return str(effect([getattr(run, key) for run in found[name]], [getattr(run, key) for run in found[baseline]]))


def difference_s(found: Found, name: str, baseline: str) -> float:
    """The median difference of TPOT in a block, in seconds."""
    pairs = zip(found[name], found[baseline], strict=True)
    return median(run.tpot_s - other.tpot_s for run, other in pairs)


def tokens(found: Found, name: str, baseline: str) -> str:
    """Whether the arms' first runs gave the same token ids."""
    differ = first_divergence(found[name][0].token_ids, found[baseline][0].token_ids)
    return "identical" if differ is None else f"differ from {differ} on"
