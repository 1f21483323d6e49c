"""Notices when the model or the cut in use is no longer the one that an open page shows.

A hidden field of the page holds the key of what it shows. The page polls every LOOK_S seconds, outside the queue, and
compares it with the current key.
"""

from html import escape
from typing import Any

import gradio as gr

from splitlearn.arms.runs import Runs
from splitlearn.arms.startup import Startup
from ui.flags.picker import Updates

LOOK_S = 5.0


class ModelNotice:
    """The components, in the head of the page. `connect` adds the handlers. A redraw of the model includes `seen()`."""

    def __init__(self, startup: Startup) -> None:
        self._startup = startup
        self.message = gr.HTML(_status(""), elem_id="model-news")
        self.shown = gr.Textbox("", visible="hidden", elem_id="model-shown")
        self.now = gr.Textbox("", visible="hidden", elem_id="model-now")
        self.timer = gr.Timer(LOOK_S)

    def connect(self) -> Any:
        """Add the event handlers. Returns the event of a model or cut that the page does not show yet."""
        self.timer.tick(self._look, self.shown, self.now, queue=False)
        return self.now.change

    def seen(self) -> Updates:
        """Record that the page shows the model and cut in use."""
        return {self.shown: key(self._startup.runs)}

    def news(self, shown: object) -> Updates:
        """Say what has changed since the page showed the key `shown`."""
        runs = self._startup.runs
        before, now = str(shown or "").split(), key(runs).split()
        if not before or before == now:
            return {}
        plan = runs.plan
        cut = f"The cut has changed: the trunk has layers [{plan.start}, {plan.end}) now."
        model = f"The model has changed: {runs.files.name} is in use now."
        return {self.message: _status(cut if before[0] == now[0] else model)}

    def quiet(self) -> Updates:
        """Clear the notice."""
        return {self.message: _status("")}

    def _look(self, shown: str) -> Any:
        """The key of the model and cut in use, if the page shows another one. Unknown while anything loads."""
        if self._startup.running or self._startup.failure:
            return gr.skip()
        now = key(self._startup.runs)
        return gr.skip() if now == shown else now


def key(runs: Runs) -> str:
    """The key of the model and cut in use."""
    return f"{runs.files.digest} {runs.plan.start} {runs.plan.end}"


def _status(text: str) -> str:
    """A live region. It is there before it has text, so that screen readers announce its changes."""
    return f'<p class="sl-status" role="status" aria-live="polite">{escape(text)}</p>'
