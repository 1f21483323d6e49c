"""What the page shows of one comparison, as HTML: a card for each side, and what follows from both."""

from collections.abc import Callable, Mapping
from html import escape

from splitlearn.arms.compare import Pairs
from splitlearn.arms.model import Model
from splitlearn.arms.report import ArmReport
from splitlearn.arms.startup import Part
from splitlearn.breakdown import Ratio
from splitlearn.config import Config
from splitlearn.events import Reconnecting
from splitlearn.metrics import RunMetrics, recovery_sentence, tps_of_all
from splitlearn.runtime import cgroups
from ui.compare import candidates
from ui.compare.session import ArmView, ComparisonView, State
from ui.format import MISSING, rate, seconds, size
from ui.html import error, folded, head_row, note, small, table, tile

TITLES = {"full": ("Full", "whole model, one local process"), "split": ("Split", "client here, trunk behind gRPC")}
STATES: dict[State, str] = {
    "idle": "not run yet",
    "waiting": "waits for its turn",
    "warming": "starts by itself once both arms are loaded",
    "loading": "loading and warming up",
    "compiled": "compiled; running again for the measurement",
    "running": "running",
    "reconnecting": "reconnecting",
    "again": "measuring again",
    "between": "measured",
    "done": "done",
    "stopped": "stopped",
    "failed": "failed",
}
BUSY: frozenset[State] = frozenset({"warming", "loading", "compiled"})
REASONS = {"eos": "ended by itself", "length": "token limit reached", "stop": "stop string met", "cancelled": "stopped"}
FIGURES: dict[str, tuple[str, Callable[[RunMetrics], str]]] = {
    "TTFT": ("Time to first token: from the prompt's submission to token 1", lambda run: seconds(run.ttft_s)),
    "TPOT": ("Time per output token after the first", lambda run: seconds(run.tpot_s)),
    "TPS (decode)": ("Tokens per second after the first: 1 / TPOT", lambda run: rate(run.decode_tps)),
    "TPS (request)": ("Tokens per second of the whole request", lambda run: rate(run.tps)),
    "Tokens": ("Token ids generated", lambda run: str(run.n_tokens)),
}
ALL = "Tokens of all samples per second, until the last of them was there; the other figures are of sample 1"
DRAFTS = "Draft tokens that came true, of those that were fed to be verified"
HEAD_STARTS = "Steps that were begun with the right token, of those that were begun before the token was sure"
SHIPPED = (
    "More bytes each way for each token, if the KV cache crossed the wire: KV bytes per token times the mean context"
)
RATIO = (
    "{} of split / {} of full: the geometric mean of the pairs, with the least and the most. Above 1, split is slower"
)
UP, DOWN = (
    "From the client to the trunk, for each decoded token",
    "From the trunk to the client, for each decoded token",
)
MEMORY = "Peak memory of the client's process beyond its imports, and of the full model's"
RECOVERED = "a trunk was lost meanwhile"
EMPTY = (
    "Press Compare. Here you see whether both answers have the same tokens, how much longer a token takes in split, "
    "and what for."
)
QUIET_CPU = 0.25  # as in the lab: what other programs may use before a figure is in doubt


def card(arm: ArmView) -> str:
    """One side: its state, its figures, its answer."""
    title, what = TITLES[arm.kind]
    state = REASONS[arm.metrics.finish_reason] if arm.state == "done" and arm.metrics else STATES[arm.state]
    return (
        f'<section class="sl-card sl-{arm.kind}" aria-label="{title} model" data-state="{arm.state}">'
        f'<header><h2>{title}</h2><span class="sl-what">{what}</span>'
        f'<span class="sl-state">{state}{_clock() if arm.state in BUSY else ""}</span></header>'
        f'<div class="sl-busy" {"" if arm.lost or arm.state in BUSY else "hidden"}></div>'
        f'<dl class="sl-tiles">{_figures(arm)}</dl>{_recoveries(arm)}{_answer(arm)}</section>'
    )


def status(shown: ComparisonView, place: int = 0) -> str:
    """One line beside the buttons: what happens now. `place` is this visitor's in the line, 0 for the one who runs."""
    if place:
        return f"Another visitor's comparison is running. You are number {place} in line; yours starts by itself."
    for arm in (shown.full, shown.split):
        if arm.state in (*BUSY, "running", "reconnecting", "again"):
            turn = f", run {len(arm.reports) + 1} of {shown.asked}" if shown.asked > 1 else ""
            return f"{TITLES[arm.kind][0]}{turn}: {_now(arm)}"
    if not shown.ended and shown.pairs and len(shown.pairs.full) == shown.asked and shown.pairs.divergence:
        return "Asking both arms what they could choose where the tokens differ."
    if shown.ended:
        return "Stopped." if "stopped" in (shown.full.state, shown.split.state) else "Done."
    return ""


def _now(arm: ArmView) -> str:
    if arm.lost:
        return f"the trunk server was lost. Reconnecting, attempt {arm.lost.attempt}."
    first = " The first time takes longer." if arm.state == "loading" else ""
    return f"{STATES[arm.state]}.{first}"


def elsewhere(others: int) -> str:
    """For a page that was just opened, or loaded again: others run and wait. Empty when nobody does."""
    said = f"A comparison is running. If you press Compare, yours is number {others} in line and starts by itself."
    return said if others else ""


def errors(shown: ComparisonView) -> str:
    """What went wrong in a comparison, each arm by its name."""
    said = [f"{TITLES[arm.kind][0]}: {arm.error}" for arm in (shown.full, shown.split) if arm.error]
    return error(" ".join(filter(None, (shown.error, *said))))


def result(shown: ComparisonView, flags: str) -> str:
    """What follows from both arms: are the tokens the same, what does splitting cost. Says what will be here before."""
    pairs = shown.pairs
    if pairs is None:
        return f'<section class="sl-result" aria-label="Comparison"><p class="sl-small">{EMPTY}</p></section>'
    full, split = pairs.typical("full"), pairs.typical("split")
    why = pairs.difference.sentence() if pairs.difference else ""
    return (
        f'<section class="sl-result" aria-label="Comparison">{_verdict(pairs)}{candidates.lists(shown.logits)}'
        f'<dl class="sl-tiles sl-hero">{"".join(_ratios(pairs, full, split))}</dl>'
        f'<p class="sl-why">{escape(why)}</p>{_doubts(shown, pairs)}'
        f"{folded('Memory and how it was measured', _memory(full, split) + small(_how(full, split, flags)))}</section>"
    )


def prompt(shown: ComparisonView) -> str:
    """What the model saw of the prompt, folded away, with its control tokens marked; empty before both reports."""
    if shown.pairs is None:
        return ""
    full = shown.pairs.typical("full")
    text = "".join(f"<mark>{escape(text)}</mark>" if control else escape(text) for text, control in full.texts.prompt)
    name = f"The prompt as the model sees it: {full.metrics.prompt_tokens} tokens, control tokens marked"
    return folded(name, f'<div class="sl-seen" dir="auto">{text}</div>', "sl-prompt")


def facts(config: Config, model: Model | None) -> str:
    """One line on what is compared; of a `model` that is not read yet, what the configuration says."""
    parts = [f"<b>{escape(config.model.name if model is None else model.files.name)}</b>"]
    if model is None:
        parts += [config.model.dtype]
    else:
        parts += [f"{config.model.dtype} on {escape(model.capabilities.place.device)}"]
    parts += [f"trunk: {escape(', '.join(config.trunk.address))}"]
    return f'<p class="sl-facts">{" &middot; ".join(parts)}</p>'


def split_facts(config: Config, model: Model | None) -> str:
    """How the model is cut and where its trunk is: set in config.yaml, not here. Empty before the model is read."""
    if model is None:
        return ""
    plan, trunk = model.plan, config.trunk
    where = "started by this program" if trunk.embedded else f"at {' or '.join(trunk.address)}"
    client = f"[0, {plan.start}) and [{plan.end}, {plan.n_layers})"
    said = f"Split: the client has layers {client}, the trunk [{plan.start}, {plan.end}). Trunk server {where}."
    how = "config.yaml sets both; the tab Model and cut takes another model or cut."
    return small(f"{said} {how} This program may use {cgroups.machine()}.")


def startup(parts: Mapping[str, Part], running: bool) -> str:
    """What is being loaded; once that is over, what is not loaded and why. Empty when all is."""
    if running:
        said = "; ".join(
            f"{name} {part.state}{f' ({part.detail})' if part.detail else ''}" for name, part in parts.items()
        )
        return note(f"Loading: {said}. Compare can be pressed now: it starts by itself.")
    reasons = {state: _reasons(parts, state) for state in ("failed", "later")}
    failed = error(f"Not loaded: {reasons['failed']}. The next comparison tries again.") if reasons["failed"] else ""
    return failed + note(f"Not loaded: {reasons['later']}." if reasons["later"] else "")


def _reasons(parts: Mapping[str, Part], state: str) -> str:
    return "; ".join(f"{name}: {part.detail.rstrip('.')}" for name, part in parts.items() if part.state == state)


def _clock(since: float = 0.0) -> str:
    """Seconds that count on from `since` by themselves, drawn by the browser: nothing is sent while something loads."""
    return f'<span class="sl-clock" style="animation-delay:-{since:.1f}s" aria-hidden="true"></span>'


def _figures(arm: ArmView) -> str:
    run = arm.metrics
    tiles = [tile(name, figure(run) if run else MISSING, why, arm.kind) for name, (why, figure) in FIGURES.items()]
    if arm.others:
        tiles.append(tile(f"TPS (all {len(arm.samples)})", rate(tps_of_all(arm.samples)), ALL, arm.kind))
    if run and run.drafts:
        tiles.append(tile("Drafts", f"{run.drafts_accepted} of {run.drafts}", DRAFTS, arm.kind))
    if run and run.head_starts:
        tiles.append(tile("Head starts", f"{run.head_starts_right} of {run.head_starts}", HEAD_STARTS, arm.kind))
    return "".join(tiles)


def _answer(arm: ArmView) -> str:
    waiting = "Runs go one after the other: two at once would measure each other." if arm.state == "waiting" else ""
    texts = [escape(each.text.strip()) for each in arm.samples]
    if len(texts) > 1:
        texts = [f'<p class="sl-small">Sample {number}</p>{text}' for number, text in enumerate(texts, 1)]
    shown = "".join(texts) or f'<span class="sl-small">{waiting}</span>'
    name = f"{TITLES[arm.kind][0]} model's answer"
    return f'<div class="sl-answer" tabindex="0" role="region" aria-label="{name}"><div dir="auto">{shown}</div></div>'


def _recoveries(arm: ArmView) -> str:
    """A sentence for each time that the trunk was lost and found again, and what is done about it now."""
    runs = [sample for report in arm.reports for sample in report.samples]
    now = [] if any(arm.metrics is run for run in runs) else list(arm.samples)
    said = " ".join(recovery_sentence(*recovered) for each in (*runs, *now) for recovered in each.recoveries)
    now_lost = _reconnecting(arm.lost) if arm.lost else ""
    return f'<p class="sl-small">{escape(said)} {now_lost}</p>' if said or now_lost else ""


def _reconnecting(lost: Reconnecting) -> str:
    at = _clock(lost.seconds)
    return f"Reconnecting to the trunk server (attempt {lost.attempt}{at}). The answer goes on once it is back."


def _verdict(pairs: Pairs) -> str:
    differ = pairs.divergence
    if differ is None:
        tokens = sum(each.n_tokens for each in pairs.full[0].samples)
        return f'<p class="sl-verdict sl-same">Identical: all {tokens} tokens are the same.</p>'
    full, split = ("nothing" if text is None else repr(text) for text in differ.tokens)
    where = f" of sample {differ.sample + 1}" if differ.full.others else ""
    return (
        f'<p class="sl-verdict sl-differ">The tokens differ from token {differ.at + 1}{where} on: '
        f"full has {escape(full)}, split has {escape(split)}.</p>"
    )


def _ratios(pairs: Pairs, full: ArmReport, split: ArmReport) -> list[str]:
    steps = max(1, split.metrics.n_tokens - 1)
    memory = f"{_beyond(split)} <small>of {_beyond(full)}</small>"
    return [
        tile("TPOT, split / full", _ratio(pairs.tpot), RATIO.format("TPOT", "TPOT"), "result", "sl-big"),
        tile("TTFT, split / full", _ratio(pairs.ttft), RATIO.format("TTFT", "TTFT"), "result", "sl-big"),
        tile("Client memory", memory, MEMORY, "result"),
        tile("Bytes up per token", size(split.metrics.decode_bytes_up / steps), UP, "result"),
        tile("Bytes down per token", size(split.metrics.decode_bytes_down / steps), DOWN, "result"),
        tile("KV cache, were it shipped", size(split.kv_shipped_bytes), SHIPPED, "result"),
    ]


def _ratio(found: Ratio | None) -> str:
    if found is None:
        return f"{MISSING} <small>{RECOVERED}</small>"
    pairs = "1 pair" if found.n == 1 else f"{found.least:.2f} to {found.most:.2f}, {found.n} pairs"
    return f"{found.mean:.2f}\N{MULTIPLICATION SIGN} <small>{pairs}</small>"


def _doubts(shown: ComparisonView, pairs: Pairs) -> str:
    """What a reader has to know before she trusts the ratio."""
    said = []
    if shown.others_cpu > QUIET_CPU:
        said.append(f"Other programs used {shown.others_cpu:.1f} cores meanwhile: do not trust a small difference.")
    if pairs.tpot and pairs.tpot.n > 1 and pairs.tpot.covers_one:
        said.append("Some pairs say that split is faster, some that it is slower.")
    if len(pairs.counted) < len(pairs.full):
        said.append("A run in which a trunk was lost is not in the ratio.")
    return f'<p class="sl-small sl-doubt">{escape(" ".join(said))}</p>' if said else ""


def _memory(full: ArmReport, split: ArmReport) -> str:
    """Peak memory of each process beyond what its imports take, and that beside it."""
    sizes = [("full", full.peak_rss_bytes, full.import_rss_bytes)]
    sizes.append(("client", split.peak_rss_bytes, split.import_rss_bytes))
    if split.trunk is not None:
        sizes.append(("trunk", split.trunk.peak_rss_bytes, split.trunk.import_rss_bytes))
    rows = [(name, size(peak - imports), size(imports)) for name, peak, imports in sizes]
    return table(head_row("Peak memory", "model and run", "imports alone"), rows, "Memory")


def _beyond(report: ArmReport) -> str:
    return size(report.peak_rss_bytes - report.import_rss_bytes)


def _how(full: ArmReport, split: ArmReport, flags: str) -> str:
    threads = f"{full.threads} threads" if full.threads != 1 else "1 thread"
    trunk = f"; trunk at {split.trunk_address or ''}" if split.trunk else ""
    compiled = "".join(
        f" Compiling took {seconds(arm.compile_s)} in the {arm.kind} arm, not counted above."
        for arm in (full, split)
        if arm.compile_s
    )
    return (
        f"Flags: {flags}. Each arm in a warm process with {threads}{trunk}, in random order.{compiled} "
        "Figures of an arm are those of its median run."
    )
