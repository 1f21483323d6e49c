"""Below two pinned comparisons: a button that shows the candidates where their answers diverge."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from splitlearn.errors import SplitlearnError
from splitlearn.runtime.progress import Step
from ui import html
from ui.flags.picker import Updates
from ui.history import divergence, record, view
from ui.history.divergence import Divergence
from ui.history.record import Entry
from ui.model import cuts
from ui.model.actions import Planner
from ui.visitors import visitor

WHAT = (
    "Shows the candidates of both at the marked token, with logits. Both run again up to it, which takes some seconds."
)
SPEAKS = "element.setAttribute('role', 'status')"


class DivergencePanel:
    """Visible while two comparisons with different answers are pinned. `connect` adds the event handlers."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        with gr.Column(visible=False, elem_id="divergence") as self.all:
            gr.HTML(html.small(WHAT))
            with gr.Row():
                self.ask = gr.Button("Candidates here", size="sm", scale=0, min_width=160, elem_id="divergence-ask")
                self.stop = gr.Button(
                    "Stop", size="sm", scale=0, min_width=80, interactive=False, elem_id="divergence-stop"
                )
            self.status = gr.HTML("", js_on_load=SPEAKS, elem_id="divergence-status")
            self.error = gr.HTML("", elem_id="divergence-error")
            self.found = gr.HTML("", elem_id="divergence-found")

    @property
    def drawn(self) -> list[Any]:
        """The components that `show` updates."""
        return [self.all, self.status, self.error, self.found]

    def show(self, one: Entry | None, other: Entry | None) -> Updates:
        """Update the panel for the pinned comparisons, if any."""
        apart = one is not None and other is not None and divergence.differ(one, other)
        return {self.all: gr.Column(visible=apart), self.status: "", self.error: "", self.found: ""}

    def connect(self, kept: Any, one: Any, other: Any) -> None:
        """Add the event handlers. `kept` is the history; `one` and `other` name the pinned comparisons."""
        buttons, drawn = [self.ask, self.stop], [self.status, self.error, self.found]
        begun = self.ask.click(self._begin, None, [*buttons, *drawn], queue=False)
        # In the queue of all runs: two at once would disturb each other.
        ran = begun.then(self._run, [kept, one, other], drawn, concurrency_id="runs", concurrency_limit=1)
        self.stop.click(self._stop, None, self.stop, queue=False)
        ran.then(self._end, None, buttons, queue=False)

    def _begin(self, request: gr.Request) -> Updates:
        place = self.planner.begin(visitor(request))
        return {**self._enabled(running=True), self.status: cuts.turn(place), self.error: "", self.found: ""}

    def _run(self, kept: object, first: object, second: object, request: gr.Request) -> Iterator[Updates]:
        one, other = record.find(kept, first, second)
        if one is not None and other is not None:
            yield from self._ask(one, other, visitor(request))
        stopped = self.planner.stops.signal(visitor(request)).is_set()
        yield {self.status: cuts.note("Stopped." if stopped else "")}

    def _ask(self, one: Entry, other: Entry, who: str) -> Iterator[Updates]:
        found: list[Divergence] = []
        try:
            for each in divergence.candidates(self.planner, one, other, who):
                if isinstance(each, Step):
                    yield {self.status: cuts.progress(each)}
                else:
                    found.append(each)
                    yield {self.found: view.candidates(one, other, found)}
        except SplitlearnError as error:
            yield {self.error: html.error(str(error))}

    def _stop(self, request: gr.Request) -> Any:
        self.planner.stops.stop(visitor(request))
        return gr.Button(interactive=False)

    def _end(self, request: gr.Request) -> Updates:
        self.planner.line.leave(visitor(request))
        return self._enabled(running=False)

    def _enabled(self, running: bool) -> Updates:
        return {each: gr.Button(interactive=running == (each is self.stop)) for each in (self.ask, self.stop)}
