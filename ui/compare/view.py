"""What the page shows of one comparison, as HTML: a card for each side, and what follows from both."""

import re
from collections.abc import Callable, Iterable, Mapping
from html import escape

from splitlearn.arms.model import Model
from splitlearn.arms.runs import ArmReport
from splitlearn.arms.startup import Part
from splitlearn.config import Config
from splitlearn.metrics import RunMetrics, first_difference, recovery_sentence, tps_of_all
from splitlearn.runtime import cgroups
from ui.compare.session import ArmView, ComparisonView, State
from ui.format import MISSING, rate, ratio, seconds, size

TITLES = {"full": ("Full", "whole model, one local process"), "split": ("Split", "client here, trunk behind gRPC")}
STATES: dict[State, str] = {
    "idle": "not run yet",
    "waiting": "waiting",
    "warming": "starts by itself once both arms are loaded",
    "loading": "loading and warming up",
    "compiled": "compiled; running again for the measurement",
    "running": "running",
    "done": "done",
    "stopped": "stopped",
    "failed": "failed",
}
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


def card(arm: ArmView) -> str:
    """One side: its state, its figures, its answer."""
    title, what = TITLES[arm.kind]
    busy = arm.state in {"warming", "loading", "compiled"}
    state = REASONS[arm.metrics.finish_reason] if arm.state == "done" and arm.metrics else STATES[arm.state]
    run = arm.metrics
    tiles = "".join(_tile(name, figure(run) if run else MISSING, why) for name, (why, figure) in FIGURES.items())
    if arm.others:
        tiles += _tile(f"TPS (all {len(arm.samples)})", rate(tps_of_all(arm.samples)), ALL)
    if run and run.drafts:
        tiles += _tile("Drafts", f"{run.drafts_accepted} of {run.drafts}", DRAFTS)
    if run and run.head_starts:
        tiles += _tile("Head starts", f"{run.head_starts_right} of {run.head_starts}", HEAD_STARTS)
    return (
        f'<section class="sl-card sl-{arm.kind}" aria-label="{title} model" data-state="{arm.state}">'
        f'<header><h3>{title}</h3><span class="sl-what">{what}</span>'
        f'<span class="sl-state" role="status">{state}</span></header>'
        f'<div class="sl-busy" {"" if busy else "hidden"}></div>'
        f'<dl class="sl-tiles">{tiles}</dl>{_recoveries(arm)}{_answer(arm)}</section>'
    )


def error(message: str) -> str:
    """The box that says what is wrong; empty when nothing is."""
    return f'<div class="sl-error" role="alert">{escape(message)}</div>' if message else ""


def errors(shown: ComparisonView) -> str:
    """What went wrong in a comparison, each arm by its name."""
    said = [f"{TITLES[arm.kind][0]}: {arm.error}" for arm in (shown.full, shown.split) if arm.error]
    return error(" ".join(filter(None, (shown.error, *said))))


def result(shown: ComparisonView, flags: str) -> str:
    """What follows from both reports: are the tokens the same, what does splitting cost; empty before that."""
    if shown.both is None:
        return ""
    full, split = shown.both
    one, other = full.metrics, split.metrics
    steps = max(1, other.n_tokens - 1)
    tiles = (
        _tile("TTFT split/full (n = 1)", ratio(other.ttft_s, one.ttft_s), "One run of each"),
        _tile("TPOT split/full (n = 1)", ratio(other.tpot_s, one.tpot_s), "One run of each"),
        _tile("Bytes up per token", size(other.decode_bytes_up / steps), "To the trunk, for each decoded token"),
        _tile("Bytes down per token", size(other.decode_bytes_down / steps), "From the trunk, for each decoded token"),
        _tile("KV cache, were it shipped", size(split.kv_shipped_bytes), SHIPPED),
    )
    return (
        f'<section class="sl-result" aria-label="Comparison">{_verdict(full, split)}'
        f'<dl class="sl-tiles">{"".join(tiles)}</dl>{_memory(full, split)}'
        f'<p class="sl-small">Flags: {escape(flags)}. {_how(full, split)}</p></section>'
    )


def prompt(shown: ComparisonView) -> str:
    """What the model saw of the prompt, folded away, with its control tokens marked; empty before both reports."""
    if shown.both is None:
        return ""
    full = shown.both[0]
    text = "".join(f"<mark>{escape(text)}</mark>" if control else escape(text) for text, control in full.texts.prompt)
    summary = f"The prompt as the model sees it: {full.metrics.prompt_tokens} tokens, control tokens marked"
    return f'<details class="sl-prompt"><summary>{summary}</summary><div class="sl-seen">{text}</div></details>'


def facts(config: Config, model: Model | None) -> str:
    """One line on what is compared; of a `model` that is not read yet, what the configuration says."""
    parts = [f"<b>{escape(config.model.name if model is None else model.files.name)}</b>"]
    if model is None:
        parts += [config.model.dtype]
    else:
        plan, device = model.plan, model.capabilities.place.device
        parts += [f"{config.model.dtype} on {escape(device)}"]
        parts += [f"trunk layers [{plan.start}, {plan.end}) of {plan.n_layers}"]
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
    here = f"This program may use {cgroups.machine()}."
    return f'<p class="sl-small">{escape(said)} config.yaml sets both. {escape(here)}</p>'


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


def note(message: str) -> str:
    """Something a visitor should know; empty when there is nothing."""
    linked = re.sub(r"https?://[^\s<]+", lambda url: f'<a href="{url[0]}">{url[0]}</a>', escape(message))
    return f'<div class="sl-note" role="status">{linked}</div>' if message else ""


def table(head: str, rows: Iterable[Iterable[str]], name: str) -> str:
    """A table that scrolls inside its own box; the first cell of each row is its header. Cells are HTML."""
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return (
        f'<div class="sl-scroll" tabindex="0" role="region" aria-label="{name}">'
        f'<table class="sl-table"><thead>{head}</thead><tbody>{body}</tbody></table></div>'
    )


def head_row(*names: str) -> str:
    """One line of column headers."""
    cells = "".join(f'<th scope="col">{name}</th>' for name in names)
    return f"<tr>{cells}</tr>"


def _tile(name: str, value: str, why: str) -> str:
    return f'<div title="{why}"><dt>{name}</dt><dd>{value}</dd></div>'


def _answer(arm: ArmView) -> str:
    waiting = "Runs go one after the other: two at once would measure each other." if arm.state == "waiting" else ""
    texts = [escape(each.text.strip()) for each in arm.samples]
    if len(texts) > 1:
        texts = [f'<p class="sl-small">Sample {number}</p>{text}' for number, text in enumerate(texts, 1)]
    shown = "".join(texts) or f'<span class="sl-small">{waiting}</span>'
    return f'<div class="sl-answer" tabindex="0" role="region" aria-label="Answer"><div>{shown}</div></div>'


def _recoveries(arm: ArmView) -> str:
    """A sentence for each time that the trunk was lost and found again."""
    said = " ".join(recovery_sentence(*recovered) for each in arm.samples for recovered in each.recoveries)
    return f'<p class="sl-small" role="status">{escape(said)}</p>' if said else ""


def _verdict(full: ArmReport, split: ArmReport) -> str:
    differ = first_difference(full.samples, split.samples)
    if differ is None:
        tokens = sum(each.n_tokens for each in full.samples)
        return f'<p class="sl-verdict sl-same">Identical: all {tokens} tokens are the same.</p>'
    sample, at = differ
    both = [report.texts.tokens[sample] for report in (full, split)]
    pairs = [repr(texts[at]) if at < len(texts) else "nothing" for texts in both]
    where = f" of sample {sample + 1}" if full.others else ""
    return (
        f'<p class="sl-verdict sl-differ">The tokens differ from token {at + 1}{where} on: '
        f"full has {escape(pairs[0])}, split has {escape(pairs[1])}.</p>"
    )


def _memory(full: ArmReport, split: ArmReport) -> str:
    """Peak memory of each process beyond what its imports take, and that beside it."""
    sizes = [("full", full.peak_rss_bytes, full.import_rss_bytes)]
    sizes.append(("client", split.peak_rss_bytes, split.import_rss_bytes))
    if split.trunk is not None:
        sizes.append(("trunk", split.trunk.peak_rss_bytes, split.trunk.import_rss_bytes))
    rows = [(name, size(peak - imports), size(imports)) for name, peak, imports in sizes]
    return table(head_row("Peak memory", "model and run", "imports alone"), rows, "Memory")


def _how(full: ArmReport, split: ArmReport) -> str:
    threads = f"{full.threads} threads" if full.threads != 1 else "1 thread"
    trunk = f"; trunk at {escape(split.trunk_address or '')}" if split.trunk else ""
    compiled = "".join(
        f" Compiling took {seconds(arm.compile_s)} in the {arm.kind} arm, not counted above."
        for arm in (full, split)
        if arm.compile_s
    )
    return f"Each arm in a warm process with {threads}{trunk}, in random order.{compiled}"
