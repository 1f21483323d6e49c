"""Where the two arms first chose different tokens: what each of them could choose from."""

import math
from html import escape

from splitlearn.arms.compare import DivergentLogits
from splitlearn.events import KINDS, Kind
from ui.html import folded, head_row, small, table

WHY = (
    "Each arm ran again as far as that token, after everything that is timed. Two candidates whose logits are as near "
    "as rounding moves them are a near tie; a wide gap is another computation."
)
CHANGED = "Run again, an arm chose another token than before."


def lists(found: DivergentLogits | None) -> str:
    """Both arms' candidates with logits and probabilities, folded; empty where nothing differs."""
    if found is None:
        return ""
    tables = "".join(
        f"<div>{_table(found, kind, chosen)}</div>" for kind, chosen in zip(KINDS, found.tokens, strict=True)
    )
    said = small(WHY) + ("" if found.repeatable else small(CHANGED))
    return folded("What each could choose there", f'{said}<div class="sl-two">{tables}</div>')


def _table(found: DivergentLogits, kind: Kind, chosen: int | None) -> str:
    rows = []
    for each in found.of(kind).listed:
        text = f'<span dir="auto">{escape(repr(each.text))}</span>'
        name = f"<b>{text}</b> (chosen)" if each.token_id == chosen else text
        rows.append((name, f"{each.logit:.4f}", f"{math.exp(each.logprob):.2%}"))
    return table(head_row(kind.capitalize(), "Logit", "Probability"), rows, f"{kind.capitalize()}: candidates")
