"""A conversation as HTML: its turns, the room left in the context, and the token ids of a turn's prompt."""

import re
from collections.abc import Sequence
from html import escape

from splitlearn.arms.report import ArmReport
from ui.chat.conversation import Turn
from ui.compare import candidates
from ui.compare.session import ComparisonView
from ui.compare.view import TITLES, turn_card, verdict
from ui.html import small

EMPTY = "Nothing was said yet. Both answers to a message come here, side by side, with the verdict on their tokens."
NOT_KEPT = "This turn has no whole answer of the full arm, so it is not part of the conversation."
NOT_COMPARED = "Not compared: there is no whole answer of the split arm."
DO = {"edit": "Edit", "retry": "Regenerate", "select": "Token ids"}
"""What can be done with a turn: the event of Gradio's that says so, and the button's name."""
PRESS = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-do]');
  if (button) trigger(button.dataset.do, {turn: +button.dataset.turn});
});
"""
# What generation/generator.py expects of a prompt and an answer that are too long together.
TOO_LONG = re.compile(r"; expected at most .*\bcontext\b")
SHORTEN = "Lower Max new tokens in the settings of the Answers tab, edit an earlier turn, or begin a new conversation."
IDS = (
    "What the model was given: the ids that the chat template and the tokenizer made of all messages, each with its "
    "text. Control tokens are marked. A token that is only part of a character has no text of its own."
)
IDS_NOT_KEPT = "The browser had no room for the token ids of this turn."
NOT_STORED = "The conversation is too long for the browser to keep: it is lost when you close or reload the page."


def turns(answered: Sequence[Turn]) -> str:
    """The answered turns of a conversation."""
    return "".join(turn(number, each, kept=True) for number, each in enumerate(answered, 1))


def turn(number: int, shown: Turn, kept: bool) -> str:
    """Turn number `number`; with its buttons if it is `kept` in the conversation."""
    buttons = "".join(
        f'<button type="button" data-do="{name}" data-turn="{number}" aria-label="{label}, turn {number}">{label}'
        "</button>"
        for name, label in DO.items()
    )
    cards = "".join(turn_card(arm, number) for arm in (shown.shown.full, shown.shown.split))
    return (
        f'<section class="sl-turn" aria-label="Turn {number}"><header><h2>Turn {number}</h2>'
        f'<div class="sl-turn-do">{buttons if kept else ""}</div></header>'
        f'<div class="sl-said" dir="auto">{escape(shown.said)}</div>'
        f'<div class="sl-two">{cards}</div>{_verdict(shown.shown, number)}</section>'
    )


def _verdict(shown: ComparisonView, number: int) -> str:
    if shown.pairs is not None:
        return verdict(shown.pairs) + candidates.lists(shown.logits, number)
    said = (NOT_COMPARED if shown.full.reports else NOT_KEPT) if shown.ended else ""
    reasons = (f"{TITLES[arm.kind][0]}: {arm.error}" for arm in (shown.full, shown.split) if arm.error)
    return f'<p class="sl-verdict sl-off">{said}</p>{small(" ".join(reasons))}'


def context(answered: Sequence[Turn], limit: int | None) -> str:
    """The tokens of the conversation, and the room left for the next turn."""
    last = answered[-1].answer.metrics if answered and answered[-1].answer else None
    used = last.prompt_tokens + last.n_tokens if last else 0
    if limit is None:
        return small(f"Context: {used} tokens are used. The model has no limit.")
    left = max(0, limit - used)
    return small(f"Context: {used} of {limit} tokens are used; {left} are left for the next message and its answer.")


def settings(flags: str, link: str, max_new_tokens: str, temperature: str) -> str:
    """One line on what the Answers tab has chosen."""
    chosen = {"Flags": flags, "Network": link, "Max new tokens": max_new_tokens, "Temperature": temperature}
    listed = "".join(f"<span><span>{name}</span> <code>{escape(value)}</code></span>" for name, value in chosen.items())
    return f'<p class="sl-small sl-chosen">{listed}<span>Chosen on the Answers tab.</span></p>'


def refusal(shown: ComparisonView) -> str:
    """What to do about an error that concerns both arms; empty if the message says so itself."""
    return SHORTEN if TOO_LONG.search(shown.error) else ""


def token_ids(number: int, shown: Turn) -> str:
    """The token ids of a turn's prompt: once for both arms, if they were given the same ones."""
    reports = [*shown.shown.full.reports, *shown.shown.split.reports]
    if len({report.metrics.prompt_ids for report in reports}) == 1:
        listed = [("both arms", reports[0])]
    else:
        listed = [(f"the {report.kind} arm", report) for report in reports]
    inner = "".join(_ids(name, report) for name, report in listed if report.metrics.prompt_ids) or small(IDS_NOT_KEPT)
    return (
        f'<section class="sl-prompt-ids" aria-label="Prompt of turn {number}"><h2 tabindex="-1">Prompt of turn {number}'
        f"</h2>{small(IDS)}{inner}</section>"
    )


def _ids(name: str, report: ArmReport) -> str:
    tokens = zip(report.metrics.prompt_ids, report.texts.prompt_tokens, strict=True)
    listed = "".join(f'<li><b>{token}</b> <span dir="auto">{_text(*text)}</span></li>' for token, text in tokens)
    return f"<h3>{len(report.metrics.prompt_ids)} token ids, sent to {name}</h3><ol class='sl-ids'>{listed}</ol>"


def _text(text: str, is_control: bool) -> str:
    shown = escape(repr(text))
    return f"<mark>{shown}</mark>" if is_control else shown
