"""The panel "Choose another model": list the cached and catalogued models, and load one for all visitors."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import gradio as gr

from splitlearn.errors import SplitlearnError
from ui import html
from ui.flags.picker import Updates
from ui.guard.owner import ONLY_OWNER, check_owner, is_owner
from ui.model import cuts
from ui.models import view
from ui.models.actions import Chooser
from ui.visitors import visitor

SPEAKS = "element.setAttribute('role', 'status')"
WHAT = "Loaded for every visitor of this page until the program ends, with its default cut."


class ModelsPanel:
    """The panel's components. `connect` adds their event handlers."""

    def __init__(self, chooser: Chooser) -> None:
        self.chooser = chooser
        with gr.Accordion("Choose another model", open=False, elem_id="models") as self.fold:
            self.note = gr.HTML("", elem_id="models-note")
            self.list = gr.HTML(html.small("Looking for models."), elem_id="models-list")
            with gr.Column() as self.own:
                self.choice = gr.Radio([], label="Model", info=WHAT, elem_id="models-choice")
                with gr.Row():
                    self.load = gr.Button("Load this model", variant="primary", min_width=180, elem_id="models-load")
                    self.stop = gr.Button("Stop loading", interactive=False, min_width=120, elem_id="models-stop")
        self.status = gr.HTML("", js_on_load=SPEAKS, elem_id="models-status")
        self.error = gr.HTML("", elem_id="models-error")

    @property
    def drawn(self) -> list[Any]:
        """The components that show the list."""
        return [self.note, self.list, self.own, self.choice]

    def connect(self) -> Any:
        """Add the event handlers. Returns the event after which another model may be in use."""
        self.fold.expand(self._come, None, self.drawn, concurrency_limit=None)
        buttons = [self.load, self.stop]
        begun = self.load.click(self._begin, None, [*buttons, self.status, self.error], queue=False)
        ran = begun.then(
            self._load,
            self.choice,
            [*self.drawn, self.status, self.error],
            preprocess=False,  # a choice that has left the list is refused by Chooser, in the page's own words
            concurrency_id="runs",
            concurrency_limit=1,
        )
        self.stop.click(self._stop, None, self.stop, queue=False)
        return ran.then(self._end, None, buttons, queue=False)

    async def _come(self, request: gr.Request) -> AsyncIterator[Updates]:
        """On opening the list: show it at once, then again with the model hub's answers, which may come seconds later
        and leave what the owner has chosen meanwhile."""
        yield await asyncio.to_thread(self._list, request, False)
        shown = await asyncio.to_thread(self._list, request, True)
        yield {**shown, self.choice: gr.Radio(choices=shown[self.choice].choices)}

    def _list(self, request: gr.Request, probe: bool) -> Updates:
        chooser = self.chooser
        choices, may = chooser.choices(probe), is_owner(request)
        shown = choices if may else [choice for choice in choices if choice.name == chooser.name]
        possible = [(choice.status.name, choice.name) for choice in choices if not choice.why_not]
        return {
            self.note: html.note(chooser.fixed or ("" if may else ONLY_OWNER)),
            self.list: view.models(shown, chooser.name, chooser.failures if may else {}, probe),
            self.own: gr.Column(visible=may and not chooser.fixed),
            self.choice: gr.Radio(choices=possible, value=chooser.name),
        }

    def _begin(self, request: gr.Request) -> Updates:
        place = self.chooser.planner.begin(visitor(request))
        return {**self._enabled(loading=True), self.status: cuts.turn(place), self.error: ""}

    def _load(self, name: object, request: gr.Request) -> Iterator[Updates]:
        try:
            check_owner(request)
            for step in self.chooser.choose(name, visitor(request)):
                yield {self.status: cuts.progress(step)}
        except SplitlearnError as error:
            yield {**self._list(request, probe=True), self.status: "", self.error: html.error(str(error))}
            return
        note = cuts.note(f"In use: {self.chooser.name}.")
        yield {**self._list(request, probe=True), self.status: note, self.error: ""}

    def _stop(self, request: gr.Request) -> Any:
        self.chooser.planner.stops.stop(visitor(request))
        return gr.Button(interactive=False)

    def _end(self, request: gr.Request) -> Updates:
        self.chooser.planner.line.leave(visitor(request))
        return self._enabled(loading=False)

    def _enabled(self, loading: bool) -> Updates:
        return {each: gr.Button(interactive=loading == (each is self.stop)) for each in (self.load, self.stop)}
