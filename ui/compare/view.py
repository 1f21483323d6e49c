"""A comparison as HTML: a card for each arm, the result of both, and lines on the model and on loading."""

from collections.abc import Callable, Mapping
from html import escape

from splitlearn.arms.compare import Pairs
from splitlearn.arms.model import Model
from splitlearn.arms.report import ArmReport
from splitlearn.arms.startup import Part
from splitlearn.breakdown import Ratio
from splitlearn.config import Config
from splitlearn.events import Reconnecting
from splitlearn.metrics import RunMetrics, mismatch_sentence, recovery_sentence, tps_of_all
from splitlearn.runtime import cgroups
from ui.compare import candidates
from ui.compare.session import ArmView, ComparisonView, State
from ui.format import MISSING, rate, seconds, size
from ui.html import error, folded, head_row, note, small, table, tile

TITLES = {"full": ("Full", "whole model, one local process"), "split": ("Split", "client here, trunk behind gRPC")}
STATES: dict[State, str] = {
    "idle": "not run yet",
    "waiting": "waiting for its turn",
    "warming": "starts once both arms are loaded",
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
ACTIVE: frozenset[State] = BUSY | {"running", "reconnecting", "again"}
REASONS = {
    "eos": "end token reached",
    "length": "token limit reached",
    "stop": "stop string reached",
    "cancelled": "stopped",
}
FIGURES: dict[str, tuple[str, Callable[[RunMetrics], str]]] = {
    "TTFT": ("Time to first token: from the prompt's submission to token 1", lambda run: seconds(run.ttft_s)),
    "TPOT": ("Time per output token after the first", lambda run: seconds(run.tpot_s)),
    "TPS (decode)": ("Tokens per second after the first: 1 / TPOT", lambda run: rate(run.decode_tps)),
    "TPS (request)": ("Tokens per second of the whole request", lambda run: rate(run.tps)),
    "Tokens": ("Token ids generated", lambda run: str(run.n_tokens)),
}
ALL = "Tokens per second of all samples, until the last one ends; the other figures are those of sample 1"
DRAFTS = "Accepted draft tokens, of those that were verified"
HEAD_STARTS = "Flag head_overlap: steps that the trunk started on the right token, of those that it started on a guess"
SHIPPED = "Extra bytes per token, each way, if the KV cache crossed the wire: KV bytes per token × mean context"
RATIO = "{} of split / {} of full: geometric mean of the pairs, with minimum and maximum. Above 1, split is slower"
UP, DOWN = (
    "From the client to the trunk, for each decoded token",
    "From the trunk to the client, for each decoded token",
)
OF_PAIRS = "A ratio is the mean of the pairs, so it can differ from the quotient of the two cards' figures."
NEARLY = 0.05
"""How far apart two ratios are still the same to a reader."""
MEMORY = "Peak memory of the client process, libraries included, and that of the full model"
RECOVERED = "the trunk was lost"
EMPTY = (
    "Press Compare to see whether both answers have the same tokens, how much longer a token takes in split, and why."
)
QUIET_CPU = 0.25  # cores of other programs above which figures are in doubt, as in the lab


def card(arm: ArmView) -> str:
    """The card of an arm: state, figures, answer."""
    title, what = TITLES[arm.kind]
    head = f'<h2>{title}</h2><span class="sl-what">{what}</span>'
    name = f"{title} model's answer"
    answer = f'<div class="sl-answer" tabindex="0" role="region" aria-label="{name}">{_answer(arm)}</div>'
    return _card(arm, f"{title} model", head, arm.kind, answer)


def turn_card(arm: ArmView, turn: int) -> str:
    """The card of an arm in turn number `turn` of a conversation, whose answer has no scrollbar of its own."""
    title = TITLES[arm.kind][0]
    answer = f'<div class="sl-answer">{_answer(arm)}</div>'
    return _card(arm, f"{title} model, turn {turn}", f"<h3>{title}</h3>", f"{arm.kind}-{turn}", answer)


def _card(arm: ArmView, name: str, head: str, where: str, answer: str) -> str:
    state = REASONS[arm.metrics.finish_reason] if arm.state == "done" and arm.metrics else STATES[arm.state]
    return (
        f'<section class="sl-card sl-{arm.kind}" aria-label="{name}" data-state="{arm.state}">'
        f'<header>{head}<span class="sl-state">{state}{_clock() if arm.state in BUSY else ""}</span></header>'
        f'<div class="sl-busy" {"" if arm.lost or arm.state in BUSY else "hidden"}></div>'
        f'<dl class="sl-tiles">{_figures(arm, where)}</dl>{_recoveries(arm)}{answer}</section>'
    )


def status(shown: ComparisonView, place: int = 0, by_request: bool = False) -> str:
    """One line on what happens now. `place` is the visitor's place in the queue; 0 is the one who runs. `by_request`:
    a request of the OpenAI protocol runs."""
    if place and by_request:
        return f"A request of the API (/v1) is running. You are number {place} in the queue; yours starts by itself."
    if place:
        return f"Another visitor's comparison is running. You are number {place} in the queue; yours starts by itself."
    for arm in (shown.full, shown.split):
        if arm.state in ACTIVE:
            return now(arm, shown.n_pairs) + _left(shown)
    if not shown.ended and shown.pairs and len(shown.pairs.full) == shown.n_pairs and shown.pairs.divergence:
        return "Reading the candidates where the tokens differ."
    if shown.ended:
        return "Stopped." if "stopped" in (shown.full.state, shown.split.state) else "Done."
    return ""


def now(arm: ArmView, asked: int) -> str:
    """What an arm does in a comparison of `asked` runs of each."""
    run = f", run {len(arm.reports) + 1} of {asked}" if asked > 1 and arm.state in ACTIVE else ""
    name = f"{TITLES[arm.kind][0]}{run}"
    if arm.lost:
        return f"{name}: the trunk server was lost. Reconnecting, attempt {arm.lost.attempt}."
    first = " The first time takes longer." if arm.state == "loading" else ""
    return f"{name}: {STATES[arm.state]}.{first}"


def _left(shown: ComparisonView) -> str:
    """About how long it will take from here on. Empty where there is nothing to tell it by, and for a second or two."""
    return f" About {shown.left_s:.0f} s to go." if shown.left_s and shown.left_s >= 3 else ""


def elsewhere(others: int, by_request: bool) -> str:
    """For a page just opened: that others run and wait. Empty if there are none."""
    then = f"If you press Compare, yours is number {others} in the queue and starts by itself."
    runs = "A request of the API (/v1) is running." if by_request else "A comparison is running."
    return f"{runs} {then}" if others else ""


def errors(shown: ComparisonView) -> str:
    """The errors of a comparison, those of an arm after its name."""
    messages = [f"{TITLES[arm.kind][0]}: {arm.error}" for arm in (shown.full, shown.split) if arm.error]
    return error(" ".join(filter(None, (shown.error, *messages))))


def result(shown: ComparisonView, flags: str) -> str:
    """The result: whether the tokens are the same, and what splitting costs. Before the first pair, a hint."""
    pairs = shown.pairs
    if pairs is None:
        return f'<section class="sl-result" aria-label="Comparison"><p class="sl-small">{EMPTY}</p></section>'
    full, split = pairs.typical("full"), pairs.typical("split")
    why = pairs.difference.sentence() if pairs.difference else ""
    return (
        f'<section class="sl-result" aria-label="Comparison">{verdict(pairs)}{candidates.lists(shown.logits)}'
        f'<dl class="sl-tiles sl-hero">{"".join(_ratios(pairs, full, split))}</dl>'
        f'<p class="sl-why">{escape(why)}</p>{_doubts(shown, pairs, full, split)}'
        f"{folded('Memory and how it was measured', _memory(full, split) + _how(full, split, flags))}</section>"
    )


def prompt(shown: ComparisonView) -> str:
    """The prompt as the model saw it, folded, with control tokens marked. Empty before the first pair."""
    if shown.pairs is None:
        return ""
    full = shown.pairs.typical("full")
    text = "".join(f"<mark>{escape(text)}</mark>" if control else escape(text) for text, control in full.texts.prompt)
    name = f"The prompt as the model sees it: {full.metrics.prompt_tokens} tokens, control tokens marked"
    return folded(name, f'<div class="sl-seen" dir="auto">{text}</div>', "sl-prompt")


def facts(config: Config, model: Model | None) -> str:
    """One line on what is compared. Before `model` is read, by the configuration."""
    parts = [f"<b>{escape(config.model.name if model is None else model.files.name)}</b>"]
    if model is None:
        parts += [config.model.dtype]
    else:
        parts += [f"{config.model.dtype} on {escape(model.capabilities.place.device)}"]
    parts += [f"trunk: {escape(config.trunk.place)}"]
    return f'<p class="sl-facts">{" &middot; ".join(parts)}</p>'


def split_facts(config: Config, model: Model | None) -> str:
    """The cut, why it is this one if it was planned, and the place of the trunk server. Empty before the model is
    read."""
    if model is None:
        return ""
    plan, trunk = model.plan, config.trunk
    where = "started by this program" if trunk.embedded else f"at {trunk.place}"
    client = f"[0, {plan.start}) and [{plan.end}, {plan.n_layers})"
    text = f"Split: the client has layers {client}, the trunk [{plan.start}, {plan.end}). Trunk server {where}."
    how = "config.yaml sets both; the tab Model and cut changes them."
    why = small(model.why) if model.why else ""
    return small(f"{text} {how} This program may use {cgroups.machine()}.") + why


def startup(parts: Mapping[str, Part], running: bool) -> str:
    """What is loading; after that, what is not loaded and why. Empty if all is loaded."""
    if running:
        text = "; ".join(
            f"{name} {part.state}{f' ({part.detail})' if part.detail else ''}" for name, part in parts.items()
        )
        return note(f"Loading: {text}. You can press Compare now: it starts by itself.")
    reasons = {state: _reasons(parts, state) for state in ("failed", "later")}
    failed = error(f"Not loaded: {reasons['failed']}. The next comparison tries again.") if reasons["failed"] else ""
    return failed + note(f"Not loaded: {reasons['later']}." if reasons["later"] else "")


def _reasons(parts: Mapping[str, Part], state: str) -> str:
    return "; ".join(f"{name}: {part.detail.rstrip('.')}" for name, part in parts.items() if part.state == state)


def _clock(since: float = 0.0) -> str:
    """A clock that counts on from `since` in the browser, so that nothing is sent while something loads."""
    return f'<span class="sl-clock" style="animation-delay:-{since:.1f}s" aria-hidden="true"></span>'


def _figures(arm: ArmView, where: str) -> str:
    run = arm.metrics
    tiles = [tile(name, figure(run) if run else MISSING, why, where) for name, (why, figure) in FIGURES.items()]
    if arm.others:
        tiles.append(tile(f"TPS (all {len(arm.samples)})", rate(tps_of_all(arm.samples)), ALL, where))
    if run and run.drafts:
        tiles.append(tile("Drafts", f"{run.drafts_accepted} of {run.drafts}", DRAFTS, where))
    if run and run.head_starts:
        tiles.append(tile("Early starts right", f"{run.head_starts_right} of {run.head_starts}", HEAD_STARTS, where))
    return "".join(tiles)


def _answer(arm: ArmView) -> str:
    waiting = "Runs take turns: two at once would disturb each other." if arm.state == "waiting" else ""
    texts = [escape(each.text.strip()) for each in arm.samples]
    if len(texts) > 1:
        texts = [f'<p class="sl-small">Sample {number}</p>{text}' for number, text in enumerate(texts, 1)]
    shown = "".join(texts) or f'<span class="sl-small">{waiting}</span>'
    return f'<div dir="auto">{shown}</div>'


def _recoveries(arm: ArmView) -> str:
    """A sentence for each recovery from a lost trunk and each wrong answer of one, and one while it reconnects."""
    runs = [sample for report in arm.reports for sample in report.samples]
    now = [] if any(arm.metrics is run for run in runs) else list(arm.samples)
    text = " ".join(recovery_sentence(*recovered) for each in (*runs, *now) for recovered in each.recoveries)
    wrong = [mismatch for each in (*runs, *now) for mismatch in each.spot_checks.mismatches]
    text = " ".join([text, *map(mismatch_sentence, wrong)]).strip()
    now_lost = _reconnecting(arm.lost) if arm.lost else ""
    return f'<p class="sl-small">{escape(text)} {now_lost}</p>' if text or now_lost else ""


def _reconnecting(lost: Reconnecting) -> str:
    at = _clock(lost.seconds)
    return f"Reconnecting to the trunk server (attempt {lost.attempt}{at}). The answer goes on once it is back."


def verdict(pairs: Pairs) -> str:
    """Whether the tokens are the same, and where they first differ."""
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
    memory = f"{size(split.peak_rss_bytes)} <small>of {size(full.peak_rss_bytes)}</small>"
    return [
        tile("TPOT, split / full", _ratio(pairs.tpot), RATIO.format("TPOT", "TPOT"), "result", "sl-big"),
        tile("TTFT, split / full", _ratio(pairs.ttft), RATIO.format("TTFT", "TTFT"), "result", "sl-big"),
        tile("Client memory", memory, MEMORY, "result"),
        tile("Bytes up per token", size(split.metrics.decode_bytes_up / steps), UP, "result"),
        tile("Bytes down per token", size(split.metrics.decode_bytes_down / steps), DOWN, "result"),
        tile("KV cache, if sent", size(split.kv_shipped_bytes), SHIPPED, "result"),
    ]


def _ratio(found: Ratio | None) -> str:
    if found is None:
        return f"{MISSING} <small>{RECOVERED}</small>"
    pairs = "1 pair" if found.n == 1 else f"{found.least:.2f} to {found.most:.2f}, {found.n} pairs"
    return f"{found.mean:.2f}\N{MULTIPLICATION SIGN} <small>{pairs}</small>"


def _doubts(shown: ComparisonView, pairs: Pairs, full: ArmReport, split: ArmReport) -> str:
    """Reasons to doubt the ratio, whose cards show `full` and `split`."""
    doubts = []
    if cached := max(report.metrics.cached_tokens for report in (*pairs.full, *pairs.split)):
        doubts.append(f"Up to {cached} prompt tokens were kept from earlier runs: TTFT is that of the others.")
    if shown.others_cpu > QUIET_CPU:
        doubts.append(f"Other programs used {shown.others_cpu:.1f} cores meanwhile: do not trust a small difference.")
    if pairs.tpot and pairs.tpot.n > 1 and pairs.tpot.covers_one:
        doubts.append("Split is faster in some pairs, slower in others.")
    if _differs(pairs, full, split):
        doubts.append(OF_PAIRS)
    if len(pairs.counted) < len(pairs.full):
        doubts.append("Runs that lost the trunk are not in the ratio.")
    return f'<p class="sl-small sl-doubt">{escape(" ".join(doubts))}</p>' if doubts else ""


def _differs(pairs: Pairs, full: ArmReport, split: ArmReport) -> bool:
    """Whether a reader who divides the figures of the two cards gets clearly another ratio."""
    shown = (
        (pairs.tpot, Ratio.of([(full.metrics.tpot_s, split.metrics.tpot_s)])),
        (pairs.ttft, Ratio.of([(full.metrics.ttft_s, split.metrics.ttft_s)])),
    )
    return any(mean and cards and abs(cards.mean / mean.mean - 1) > NEARLY for mean, cards in shown)


def _memory(full: ArmReport, split: ArmReport) -> str:
    """A table of each process's peak memory beyond its imports, and of the imports."""
    sizes = [("full", full.peak_rss_bytes, full.import_rss_bytes)]
    sizes.append(("client", split.peak_rss_bytes, split.import_rss_bytes))
    if split.trunk is not None:
        sizes.append(("trunk", split.trunk.peak_rss_bytes, split.trunk.import_rss_bytes))
    rows = [(name, size(peak - imports), size(imports)) for name, peak, imports in sizes]
    return table(head_row("Peak memory", "model and run", "imports alone"), rows, "Memory")


def _how(full: ArmReport, split: ArmReport, flags: str) -> str:
    threads = f"{full.threads} threads" if full.threads != 1 else "1 thread"
    trunk = f"; trunk at {split.trunk_address or ''}" if split.trunk else ""
    compiled = "".join(
        f" Compiling took {seconds(arm.compile_s)} in the {arm.kind} arm, not counted above."
        for arm in (full, split)
        if arm.compile_s
    )
    how = (
        f"Flags: {flags}. Each arm in a warm process with {threads}{trunk}, in random order.{compiled} "
        "Figures of an arm are those of its median run."
    )
    return small(how)
