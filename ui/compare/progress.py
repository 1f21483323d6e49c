"""The progress of the running comparison, for visitors who wait for it.

It shows figures only. Prompt, answers and errors stay with the visitor who runs it.
"""

from ui.compare.session import ArmView, ComparisonView
from ui.compare.view import now
from ui.format import seconds
from ui.html import small

PRIVATE = "Only the other visitor sees its prompt and answers."


def progress(running: ComparisonView | None) -> str:
    """The progress of `running` as HTML; empty for None."""
    if running is None:
        return ""
    lines = "".join(f'<p class="sl-small">{_far(arm, running.n_pairs)}</p>' for arm in (running.full, running.split))
    return f'<section aria-label="The comparison that runs">{lines}{small(PRIVATE)}</section>'


def _far(arm: ArmView, n_pairs: int) -> str:
    run = arm.metrics
    far = f"{run.n_tokens} tokens, TTFT {seconds(run.ttft_s)}, TPOT {seconds(run.tpot_s)}." if run else ""
    return f"<span>{now(arm, n_pairs)}</span> <span>{far}</span>"
