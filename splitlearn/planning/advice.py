"""Two sentences with figures on the costs of all cuts: does splitting help, and where to cut."""

from collections.abc import Sequence
from dataclasses import dataclass

from splitlearn.planning.costs import CutCost, Rates, best

ERROR = 1.15
"""How far a predicted TPOT may be off, either way (docs/results/cuts.md): a ratio within it decides nothing."""
BUSY = 0.2
"""Cores that other programs use, from which on the machine counts as busy."""
DOUBT = 1.5
"""Up to this ratio, either way, a busy machine decides nothing: it slows one arm down more than the other."""


LESS = "A smaller model takes less, and weights in 4 bits do (weight_dtype)."
NEVER = "they alone take more than this client has."


@dataclass(frozen=True)
class Advice:
    """`helps`: whether the fastest cut has less TPOT than the full model; None where the error of the prediction or a
    busy machine leaves that open. `chosen` is the cut for the client's memory, the fastest one without a limit; None if
    none fits."""

    helps: bool | None
    fastest: CutCost
    smallest: CutCost
    chosen: CutCost | None
    does_it_help: str
    where_to_cut: str


def advise(found: Sequence[CutCost], rates: Rates, client_memory_bytes: float | None = None) -> Advice:
    """The advice for the costs of all cuts, and a client with so much memory (None: any)."""
    fastest = min(found, key=lambda cost: (cost.tpot_s, cost.client_memory_bytes))
    smallest = min(found, key=lambda cost: (cost.client_memory_bytes, cost.tpot_s))
    chosen = fastest if client_memory_bytes is None else best(found, client_memory_bytes)
    helps = _helps(fastest.tpot_s / rates.full_tpot_s, rates)
    return Advice(
        helps,
        fastest,
        smallest,
        chosen,
        _help(helps, fastest, smallest, rates),
        _where(chosen, smallest, rates, client_memory_bytes),
    )


def _helps(ratio: float, rates: Rates) -> bool | None:
    doubt = DOUBT if rates.others_cpu >= BUSY else ERROR
    return None if 1 / doubt < ratio < doubt else ratio < 1


def _help(helps: bool | None, fastest: CutCost, smallest: CutCost, rates: Rates) -> str:
    full, ratio = f"{_ms(rates.full_tpot_s)} a token", fastest.tpot_s / rates.full_tpot_s
    predicted = f"would take {_ms(fastest.tpot_s)} a token ({ratio:.2f} times)"
    cut = f"the fastest cut, trunk layers {_range(fastest)}, {predicted}"
    memory = f"the client needs {_mb(smallest.client_memory_bytes)} at least, against {_mb(rates.full_memory_bytes)}"
    alone = f"the full model alone takes {full}, {cut}"
    if helps is None:
        return f"Whether splitting is faster here is open: {_why_open(rates)}. So far {alone}; {memory}."
    if helps:
        return f"Splitting is faster here: {cut}, the full model alone {full}; {memory}."
    if smallest.client_memory_bytes < rates.full_memory_bytes:
        return f"Splitting is not faster here: {alone}. It saves memory: {memory}."
    return f"Splitting does not help here: {alone}, and {memory}."


def _why_open(rates: Rates) -> str:
    if rates.others_cpu >= BUSY:
        return f"other programs used {rates.others_cpu:.1f} cores meanwhile, so measure again"
    return f"predictions may be {ERROR - 1:.0%} off, so measure this cut"


def _where(chosen: CutCost | None, smallest: CutCost, rates: Rates, limit: float | None) -> str:
    if chosen is None:
        return (
            f"No cut fits a client of {_mb(limit or 0)}: the least is {_mb(smallest.client_memory_bytes)}, with trunk "
            f"layers {_range(smallest)}, of which the libraries take {_mb(rates.import_bytes)}"
            + (f". {LESS}" if rates.import_bytes < (limit or 0) else f": {NEVER}")
        )
    who = "Without a limit of memory" if limit is None else f"For a client of {_mb(limit)}"
    memory = f"{_mb(chosen.client_memory_bytes)} at the client and {_mb(chosen.trunk_memory_bytes)} at the trunk"
    share = f"the client computes {chosen.client_compute_share:.0%}"
    return f"{who}, cut at {_range(chosen)}: {_ms(chosen.tpot_s)} a token, {memory}; {share}."


def _range(cost: CutCost) -> str:
    return f"[{cost.start}, {cost.end})"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"
