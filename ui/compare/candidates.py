"""The candidates of both arms at the first token that differs, as HTML."""

import math
from html import escape

from splitlearn.arms.compare import DivergentLogits
from splitlearn.arms.spec import TokenCandidates
from splitlearn.events import KINDS
from ui.html import folded, head_row, small, table

WHY = (
    "Each arm ran again up to that token, after all timed runs. If the logits of two candidates differ by no more than "
    "rounding, it is a near tie; a wide gap means different computations."
)
CHANGED = "In this run, an arm chose another token than before."


def lists(found: DivergentLogits | None, turn: int = 0) -> str:
    """Both arms' candidates, folded; empty if the tokens are the same. In a conversation, those of that turn."""
    if found is None:
        return ""
    name = f"candidates, turn {turn}" if turn else "candidates"
    tables = "".join(
        f"<div>{listed(found.of(kind), chosen, kind.capitalize(), f'{kind.capitalize()}: {name}')}</div>"
        for kind, chosen in zip(KINDS, found.tokens, strict=True)
    )
    notes = small(WHY) + ("" if found.repeatable else small(CHANGED))
    return folded("Candidates at this token", f'{notes}<div class="sl-two">{tables}</div>')


def listed(found: TokenCandidates, chosen: int | None, head: str, name: str) -> str:
    """A table of candidates with logits and probabilities. The token with id `chosen` is marked."""
    rows = []
    for each in found.listed:
        text = f'<span dir="auto">{escape(repr(each.text))}</span>'
        marked = f"<b>{text}</b> (chosen)" if each.token_id == chosen else text
        rows.append((marked, f"{each.logit:.4f}", f"{math.exp(each.logprob):.2%}"))
    return table(head_row(head, "Logit", "Probability"), rows, name)
