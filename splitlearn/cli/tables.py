"""What the command line prints to read: tables on stdout, drawn by rich; answers as they are."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.text import Text

from splitlearn.arms.compare import KINDS, Comparison, DivergentLogits, Watch
from splitlearn.arms.link_cost import LinkCost
from splitlearn.arms.report import ArmReport, Item, Restart
from splitlearn.arms.spec import Kind
from splitlearn.checkpoints.catalogue import ModelStatus
from splitlearn.events import Reconnecting, SpotCheckResult, TokenEvent
from splitlearn.flags.registry import FLAGS, SIDES
from splitlearn.flags.selection import Availability, FlagSet
from splitlearn.flags.states import states
from splitlearn.metrics import (
    HOP_PARTS,
    LEDGER_ORDER,
    RunMetrics,
    mismatch_sentence,
    recovery_sentence,
    tps_of_all,
)
from splitlearn.runtime.console import PlainTable, console
from splitlearn.runtime.progress import Progress, Step
from splitlearn.runtime.terminal import say


def watch(progress: Progress, limit: int) -> Watch:
    """Shows how many tokens each arm has, and that it reconnects to its trunk."""
    seen: Counter[Kind] = Counter()
    lost: set[str] = set()

    def show(kind: Kind, item: Item) -> None:
        if isinstance(item, Reconnecting):
            lost.add(item.lost)
            progress(Step(f"Reconnecting to the trunk server at {item.lost}"))
            return
        while lost:
            progress(Step(f"Reconnecting to the trunk server at {lost.pop()}", 1, 1))
        if isinstance(item, Restart):
            seen[kind] = 0
        elif isinstance(item, TokenEvent):
            seen[kind] += len(item.token_ids)
        progress(Step(f"Running the {kind} model", limit if isinstance(item, ArmReport) else seen[kind], limit))

    return show


def print_comparison(found: Comparison) -> None:
    """Both answers, the figures side by side, where the time went, and whether the tokens are the same."""
    plan, shown = found.plan, console()
    say(f"{found.model}, trunk layers [{plan.start}, {plan.end}) of {plan.n_layers}")
    for name, report in (("full", found.full), ("split", found.split)):
        for number, sample in enumerate(report.samples, 1):
            shown.print(Text(f"\n{name}", "bold"), end="")
            say(f"{f', sample {number}' if report.others else ''}: {sample.text.strip()}")
    say()
    shown.print(_figures(found))
    shown.print(_ledger(found.full.metrics, found.split.metrics))
    for recovered in found.split.metrics.recoveries:
        say(recovery_sentence(*recovered))
    _say_spot_checks(SpotCheckResult.of(report.spot_checks for report in found.pairs.split))
    verdict = "identical"
    if (differ := found.pairs.divergence) is not None:
        where = f" of sample {differ.sample + 1}" if found.full.others else ""
        verdict = f"they differ from token {differ.at + 1}{where} on"
    say(f"Tokens of full and split: {verdict}.")
    if found.logits is not None:
        say(_candidates(found.logits))
    for line in _conclusion(found):
        say(line)


def _say_spot_checks(found: SpotCheckResult) -> None:
    """What the spot checks of the trunk found, if there were any."""
    for mismatch in found.mismatches:
        say(mismatch_sentence(mismatch))
    if found.checked:
        say(f"Spot checks of the trunk: {found.checked}, of which wrong: {len(found.mismatches)}.")


def print_link(cost: LinkCost) -> None:
    """The emulated link beside the real one; TTFT and TPOT, predicted and measured."""
    say(f"Link: measured {cost.real.summary}; emulated {cost.link.summary}.")
    table = PlainTable("split", "without the link", "predicted with it", "measured", "measured / predicted")
    for label, times in (("TTFT", cost.ttft), ("TPOT", cost.tpot)):
        _, predicted, measured = times
        ratio = f"{measured / predicted:.3f}" if measured and predicted else ""
        table.add_row(label, *map(_milliseconds, times), ratio)
    console().print(table)


def print_models(rows: Sequence[ModelStatus], cache: Path) -> None:
    """The catalogue, and what else is cached."""
    say(f"Models (cache: {cache})")
    table = PlainTable("model", "source", "licence", "cached", "description")
    for row in rows:
        entry = row.entry
        missing = f"no ({in_bytes(entry.download_bytes)} to fetch)" if entry else ""
        cached = in_bytes(row.cached_bytes) if row.folder else missing
        table.add_row(row.name, row.source, entry.licence if entry else "", cached, entry.description if entry else "")
    console().print(table)


def print_flags(available: Availability, applied: FlagSet) -> None:
    """The matrix of flag by side: applied, available, unavailable and why."""
    say("Flags, with config.yaml's choice")
    table = PlainTable("flag", "fidelity", *SIDES)
    styles = {"applied": "bold", "available": "", "unavailable": "dim"}
    for name, sides in states(available, applied).items():
        cells = [Text(found.reason or found.state, styles[found.state]) for found in sides.values()]
        table.add_row(name, FLAGS[name].fidelity, *cells)
    console().print(table)


def _candidates(logits: DivergentLogits) -> str:
    """The candidates of both arms where they first differ, in a line."""
    said = [
        f"{kind} {', '.join(f'{each.text!r} {each.logit:.3f}' for each in logits.of(kind).listed)}" for kind in KINDS
    ]
    again = "" if logits.repeatable else " Run again for this, an arm chose another token there."
    return f"Logits there: {'; '.join(said)}.{again}"


def _conclusion(found: Comparison) -> Iterator[str]:
    """The difference in a sentence, the range of the pairs, and the load of other programs."""
    pairs = found.pairs
    if pairs.difference is not None:
        yield pairs.difference.sentence()
    ratios = {"TTFT": pairs.ttft, "TPOT": pairs.tpot}
    said = [
        f"{name} {ratio.mean:.2f} ({ratio.least:.2f} to {ratio.most:.2f})" for name, ratio in ratios.items() if ratio
    ]
    if said and len(pairs.full) > 1:  # of one pair, the table above has the ratios
        yield f"split / full, {len(pairs.counted)} of {len(pairs.full)} pairs, mean and range: {', '.join(said)}."
    yield f"Other programs used {found.others_cpu:.1f} cores meanwhile."


def _figures(found: Comparison) -> PlainTable:
    table = PlainTable("", "full", "split", "split / full")
    full, split = found.full.metrics, found.split.metrics
    for label, of in _TIMES.items():
        one, other = of(full), of(split)
        ratio = f"{other / one:.3f}" if one and other else ""
        table.add_row(label, _milliseconds(one), _milliseconds(other), ratio)
    table.add_row("TPS (request)", f"{full.tps:.1f} /s", f"{split.tps:.1f} /s", f"{split.tps / full.tps:.3f}")
    if found.full.others:
        one, other = tps_of_all(found.full.samples), tps_of_all(found.split.samples)
        name = f"TPS (all {len(found.full.samples)} samples)"
        table.add_row(name, f"{one:.1f} /s", f"{other:.1f} /s", f"{other / one:.3f}")
    table.add_row("tokens", str(full.n_tokens), str(split.n_tokens), "")
    if full.drafts or split.drafts:
        table.add_row("drafts accepted", *(f"{each.drafts_accepted} of {each.drafts}" for each in (full, split)), "")
    if split.head_starts:
        table.add_row("early starts right", "", f"{split.head_starts_right} of {split.head_starts}", "")
    table.add_row("finished by", full.finish_reason, split.finish_reason, "")
    table.add_row("memory beyond imports", _added(found.full), _added(found.split), "")
    if found.split.trunk is not None:
        trunk = found.split.trunk
        table.add_row("memory of the trunk", "", in_bytes(trunk.peak_rss_bytes - trunk.import_rss_bytes), "")
    steps = max(1, split.n_tokens - 1)
    wire = f"{in_bytes(split.decode_bytes_up // steps)} up, {in_bytes(split.decode_bytes_down // steps)} down"
    if split.overlapped_s:
        table.add_row("trunk's time beside the client's own", "", _milliseconds(split.overlapped_s), "")
    table.add_row("wire per decoded token", "", wire, "")
    table.add_row("if the KV cache crossed, too", "", f"{in_bytes(found.split.kv_shipped_bytes)} more each way", "")
    return table


_TIMES: dict[str, Callable[[RunMetrics], float | None]] = {
    "TTFT": lambda metrics: metrics.ttft_s,
    "TPOT": lambda metrics: metrics.tpot_s,
    "ITL, median": lambda metrics: metrics.itl_p50_s,
    "E2EL": lambda metrics: metrics.e2el_s,
}


def _ledger(full: RunMetrics, split: RunMetrics) -> PlainTable:
    """Where the time went, in milliseconds per step after the first, and as a share."""
    table = PlainTable("time per decoded token", "full", "", "split", "")
    rows = {
        name: (*_share(full, full.decode_ledger.get(name)), *_share(split, split.decode_ledger.get(name)))
        for name in LEDGER_ORDER
    }
    for (start, end), parts in split.decode_hops.items():
        rows |= {f"[{start}, {end}) {name}": ("", "", *_share(split, parts.get(name))) for name in HOP_PARTS}
    for name, cells in rows.items():
        if any(cells):
            table.add_row(name, *cells)
    return table


def _share(metrics: RunMetrics, spent: float | None) -> tuple[str, str]:
    """Milliseconds per step after the first, and the share of the whole."""
    steps, all_of_it = len(metrics.itl_s), sum(metrics.decode_ledger.values())
    return (f"{spent / steps * 1e3:.2f} ms", f"{spent / all_of_it:.1%}") if spent and steps else ("", "")


def _added(report: ArmReport) -> str:
    return in_bytes(report.peak_rss_bytes - report.import_rss_bytes)


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f} ms"


def in_bytes(count: float) -> str:
    """Decimal units, as disks and networks count."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
