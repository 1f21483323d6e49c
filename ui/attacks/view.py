"""What attacks recovered, as HTML: token by token of one prompt, and the table of a sweep."""

from collections.abc import Callable, Sequence
from functools import partial
from html import escape

from splitlearn.privacy.live import Guess, Item, Reading, Said, Victim
from splitlearn.privacy.registry import ATTACKS
from splitlearn.privacy.scores import Hits
from splitlearn.privacy.summary import Line, percent
from splitlearn.privacy.sweep_job import SweepStatus
from splitlearn.runtime.progress import Step
from ui import html
from ui.attacks.actions import Client, recall
from ui.format import MISSING, seconds, size

WHAT = (
    "The trunk server gets hidden states in the place of your text. They are not private. Here attacks read a prompt "
    "from them: they have the public model and what crosses the wire, and nothing else. No setting of this page makes "
    "it private: use a trunk server that you trust with the text."
)
KEY = (
    "Underlined: the right token. In a dashed box: a wrong one, struck out, with the right one behind it. A character "
    "of several tokens is shown as one."
)
NO_SWEEP = (
    "Nothing is measured yet. Press Measure: a shallow cut takes a minute, a deep one several. It goes on when this "
    "page is closed, and stands still between two attacks while something else is measured."
)
RECALL = "Tokens with the right id at their place. Of an answer, the last token is never sent."
WHOLE = "Whether every token of the prompt was recovered."
SPEED = "The attack's time for a token, without what it learns once for a cut."
LEARNS = "What the attack learns once for a cut, from other text; kept for the next prompt."
FRONT = (
    "No other row is as good in all of these and better in one: prompt tokens recovered, layers at the client, bytes, "
    "answer tokens changed."
)
TPOT = "Of the cut without a defence, from the last measurement here, over its link."
NOT_READ = "This attack looks at what the server sends back, and reads the answer alone."


def readings(items: Sequence[Item]) -> str:
    """What is known of one prompt: what the server gets, the verdict so far, then each attack."""
    found = [item for item in items if isinstance(item, Reading)]
    victim = next((_victim(item) for item in items if isinstance(item, Victim)), "")
    guess = next((_guess(item) for item in items if isinstance(item, Guess)), "")
    key = html.small(KEY) if found else ""
    return _verdict(found) + guess + victim + key + "".join(map(_reading, found))


def _verdict(found: Sequence[Reading]) -> str:
    prompts = [each for each in found if each.prompt.tokens]
    if not prompts:
        return ""
    best = max(prompts, key=lambda each: each.prompt.right)
    whole = "the whole prompt" if best.prompt.right == best.prompt.tokens else "a part of the prompt"
    return (
        f'<p class="sl-verdict sl-differ">The server reads {whole}: {_counted(best.prompt)} tokens, by {best.attack}.'
        "</p>"
    )


def _victim(victim: Victim) -> str:
    text = (
        f"The server got {victim.prompt_tokens} hidden states of the prompt, {victim.bytes_per_token} bytes each, and "
        f"sent them back for an answer of {victim.answer_tokens} tokens:"
    )
    return f'<p class="sl-small"><span>{text}</span> <q dir="auto">{escape(victim.answer)}</q></p>'


def _guess(guess: Guess) -> str:
    return html.small(
        f"Without hidden states a language model guesses {_counted(guess.hits)} tokens, told all true ones before each."
    )


def _reading(reading: Reading) -> str:
    name = reading.attack
    whole = reading.prompt.right == reading.prompt.tokens
    prompt = _text("Prompt", reading.prompt_said) or html.small(NOT_READ)
    tiles = [
        ("Prompt tokens", _counted(reading.prompt), RECALL),
        ("Whole prompt", ("yes" if whole else "no") if reading.prompt.tokens else MISSING, WHOLE),
        ("Answer tokens", _counted(reading.answer), RECALL),
        ("Time a token", seconds(reading.seconds_per_token), SPEED),
        ("Learning", seconds(reading.prepare_s), LEARNS),
    ]
    listed = "".join(html.tile(label, value, definition, f"attack-{name}") for label, value, definition in tiles)
    return (
        f'<section class="sl-card sl-reading" aria-label="Attack {name}"><h3><code>{name}</code></h3>'
        f'{html.small(ATTACKS[name].help)}<dl class="sl-tiles">{listed}</dl>'
        f"{prompt}{_text('Answer', reading.answer_said)}</section>"
    )


def _text(name: str, said: Sequence[Said]) -> str:
    shown = "".join(map(_said, said))
    return f'<h4>{name}</h4><p class="sl-tokens">{shown}</p>' if said else ""


def _said(said: Said) -> str:
    if said.right:
        return f'<span class="sl-right" dir="auto">{_visible(said.text)}</span>'
    label = escape(f"wrong: {said.text!r}, the right one is {said.truth!r}")
    return (
        f'<span class="sl-wrong" role="img" aria-label="{label}"><s dir="auto">{_visible(said.text)}</s> '
        f'<b dir="auto">{_visible(said.truth)}</b></span>'
    )


def _visible(text: str) -> str:
    """A token's text on one line, whose line breaks can be seen."""
    return escape(text.replace("\n", "\N{RETURN SYMBOL}"))


def _counted(hits: Hits) -> str:
    return f"{hits.right}/{hits.tokens} ({hits.right / hits.tokens:.0%})" if hits.tokens else MISSING


def progress(step: Step) -> str:
    """The progress of an attack or a sweep."""
    share = f'value="{step.done:g}" max="{step.total:g}" ' if step.total else ""
    bar = f'<progress {share}aria-label="Progress"></progress>' if share else ""
    count = f"<span>{step.done:g}/{step.total:g}</span>" if step.total and step.total > 1 else ""
    return f'<div class="sl-progress"><span>{escape(step.label)}</span>{count}{bar}</div>'


def sweep_progress(status: SweepStatus) -> str:
    """How far a sweep is, or how it ended."""
    return progress(Step(f"Ended: {status.ended}") if status.ended else status.step)


def sweep(lines: Sequence[Line], client: Callable[[int], Client]) -> str:
    """A row for each cut and defence, with the strongest attack. `client` gives the client of a cut."""
    groups: dict[tuple[int, str], list[Line]] = {}
    for line in lines:
        if line.prompt is not None and line.cut:
            groups.setdefault((line.cut, line.defence), []).append(line)
    if not groups:
        return html.small(NO_SWEEP)
    clients = {cut: client(cut) for cut, _ in groups}
    strongest = [max(own, key=recall) for _, own in sorted(groups.items())]
    prices = [_price(line, clients[line.cut]) for line in strongest]
    heads = ("Layers before the trunk", "Defence", "Strongest attack", "Prompt tokens", "Whole prompts", "Prompts")
    costs = ("Time a token", "Answer tokens changed", "Perplexity", "Bytes a token", "Client layers", "Client weights")
    terms = html.term("TPOT predicted", TPOT, "sweep"), html.term("Pareto-optimal", FRONT, "sweep")
    head = html.head_row(*heads, *costs, *terms)
    rows = [
        (*_row(line, clients[line.cut]), "" if any(map(partial(_beats, price), prices)) else "yes")
        for line, price in zip(strongest, prices, strict=True)
    ]
    return f'<div class="sl-measured">{html.table(head, rows, "Recall by cut and defence")}</div>'


def _row(line: Line, client: Client) -> tuple[str, ...]:
    return (
        str(line.cut),
        line.defence,
        f"<code>{line.attack}</code>",
        percent(line.prompt),
        percent(line.whole_prompts),
        str(line.prompts),
        seconds(line.seconds_per_token),
        percent(line.flips),
        MISSING if line.perplexity is None else f"{line.perplexity:.1f}",
        str(line.token_bytes),
        str(client.n_layers),
        size(client.weight_bytes),
        seconds(client.tpot_s),
    )


def _price(line: Line, client: Client) -> tuple[float, ...]:
    """What a row costs: recall, layers at the client, bytes, answer tokens that change."""
    return recall(line), client.n_layers, line.token_bytes, line.flips.value if line.flips is not None else 0.0


def _beats(price: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether `other` is nowhere worse than `price`, and somewhere better."""
    return other != price and all(one <= two for one, two in zip(other, price, strict=True))


def command(status: SweepStatus | None) -> str:
    """The command that repeats a sweep."""
    return f"<h3>How to repeat it</h3><pre>{escape(status.command)}</pre>" if status is not None else ""
