"""Compare flags: a lab experiment on the chosen flags, shown as a table that grows.

It draws only between two runs, never while one is timed.
"""

import asyncio
from collections.abc import AsyncIterator
from html import escape
from typing import Any

import gradio as gr

from splitlearn.errors import SetupError, SplitlearnError
from splitlearn.lab.analysis.flags_table import flags_table
from splitlearn.lab.job import JobStatus
from ui import html, inputs
from ui.compare.actions import Handlers
from ui.flag_table import view
from ui.flags.picker import Picker, Updates
from ui.lab.view import progress
from ui.visitors import MOST_SIGNALS, LeastRecent, visitor
from ui.watch import Watches

MOST_TOKENS = 32
FILE = "flags.csv"
DESIGNS = [("Leave each flag out", "without"), ("Each flag alone", "alone")]
TO_TABLE = """() => document.getElementById('ft-heading').scrollIntoView({block: 'start',
  behavior: matchMedia('(prefers-reduced-motion: reduce)').matches ? 'auto' : 'smooth'})"""
BUSY = "A run is in progress: a comparison, or a request of the API. Press Compare flags again when it is done."
OTHER = "Another experiment is running, another visitor's or one of the Lab tab. Its results are shown here."
LOADING = "The model is loading. The measurement then starts by itself."


class FlagTable:
    """The table's components, built inside the Answers tab. `button` starts the experiment; `connect` adds the
    handlers."""

    def __init__(self, handlers: Handlers, button: Any) -> None:
        self.handlers, self.lab, self.button = handlers, handlers.lab, button
        self.watches = Watches(handlers.lab.job)
        self._orders: LeastRecent[str] = LeastRecent(MOST_SIGNALS)
        gr.HTML("<h2>Effect of each flag</h2>", elem_id="ft-heading")
        with gr.Row():
            self.design = gr.Radio(
                DESIGNS,
                value="without",
                label="Question",
                info="What each row measures.",
                min_width=280,
                elem_id="ft-design",
            )
            self.order = gr.Radio(
                view.ORDERS,
                value="listed",
                label="Order",
                info="During a measurement, from the next run on.",
                min_width=280,
                elem_id="ft-order",
            )
        self.progress = gr.HTML(_progress(""), elem_id="ft-progress")
        self.error = gr.HTML("", elem_id="ft-error")
        self.table = gr.HTML(view.section(None), elem_id="flag-table")
        self.changes = gr.HTML("", elem_id="ft-changes", elem_classes="sl-report")
        with gr.Row():
            self.stop = gr.Button("Stop measuring flags", size="sm", interactive=False, scale=0, elem_id="ft-stop")
            self.csv = gr.DownloadButton("Table as CSV", size="sm", visible=False, scale=0, elem_id="ft-csv")

    @property
    def drawn(self) -> list[Any]:
        """The components that show an experiment."""
        return [self.progress, self.error, self.table, self.changes, self.button, self.stop, self.csv]

    def connect(self, prompt: Any, picker: Picker) -> None:
        """Add the event handlers. `prompt` and `picker` are the Answers tab's."""
        self.prompt, self.picker = prompt, picker
        given = {prompt, *picker.given, self.design}
        # Async, so that waiting holds no thread.
        self.button.click(None, None, None, js=TO_TABLE)
        self.button.click(self._start, given, self.drawn, concurrency_limit=None)
        self.stop.click(self._stop, None, self.stop, queue=False)
        self.order.input(self._order, self.order, self.table, trigger_mode="always_last", queue=False)

    async def come(self, request: gr.Request) -> AsyncIterator[Updates]:
        """On opening the page: show the running experiment, or the last one."""
        yield {self.error: ""}  # Gradio empties the outputs of a call that yields nothing
        async for updates in self._follow(visitor(request), ""):
            yield updates

    async def _start(self, given: dict[Any, Any], request: gr.Request) -> AsyncIterator[Updates]:
        """Show what the experiment will take, start it, and follow it."""
        who, forecast = visitor(request), ""
        if self.lab.job.running:
            yield {self.error: html.error(OTHER)}
        else:
            self.handlers.stops.begin(who)
            yield {self.error: "", self.progress: _progress(LOADING), **self._buttons(True)}
            try:
                await asyncio.to_thread(self._load, who)
                words = await asyncio.to_thread(self.picker.chosen, given, self.handlers.runs)
                question = (self._typed(given[self.design]), words, given[self.prompt] or "")
                forecast = " ".join(await asyncio.to_thread(self.lab.preflight, *question))
                yield {self.progress: _progress(forecast)}
                if not self.handlers.stops.signal(who).is_set():
                    await asyncio.to_thread(self.lab.start, *question)
            except SplitlearnError as error:
                yield {self.error: html.error(str(error))}
            if not self.lab.job.running:
                yield {self.progress: _progress(""), **self._buttons(False)}
                return
        async for updates in self._follow(who, forecast):
            yield updates

    def _load(self, who: str) -> None:
        """Wait until the model is loaded. Raises SetupError while a comparison runs or waits for its turn."""
        if self.handlers.line.taken or (self.handlers.runs.busy and not self.handlers.startup.running):
            raise SetupError(BUSY)
        self.handlers.startup.begin()
        self.handlers.startup.wait(self.handlers.stops.signal(who))

    def _typed(self, design: str) -> dict[str, Any]:
        """The lab's default settings with shorter runs."""
        usual = inputs.lab_at_first(self.handlers.runs.config.generation)
        tokens = str(min(int(usual["tokens"]), MOST_TOKENS))
        return {**usual, "tokens": tokens, "design": design, "limit": "decided"}

    async def _follow(self, who: str, forecast: str) -> AsyncIterator[Updates]:
        """Draw the table after each run, to the end of the experiment."""
        before = None
        async for status in self.watches.follow(who):
            yield await asyncio.to_thread(self._updates, before, status, who, forecast)
            before = status

    def _updates(self, before: JobStatus | None, status: JobStatus, who: str, forecast: str) -> Updates:
        """Update the figures after each run, and the folded parts and the file after each block: redrawing folds
        them."""
        updates: Updates = {self.progress: progress(status) + html.small(forecast)}
        if before is None or status.ended:
            updates |= self._buttons(not status.ended)
        if status.error:
            updates[self.error] = html.error(status.error)
        if status.findings is None:
            return updates
        updates[self.table] = self._draw(status, who)
        if before is None or status.ended or _part(before) != _part(status):
            updates |= {self.changes: view.changes(flags_table(status.findings)), self.csv: self._file(status, who)}
        return updates

    def _draw(self, status: JobStatus, who: str) -> str:
        found = flags_table(status.findings) if status.findings else None
        return view.section(found, self._orders.get(who) or "listed")

    def _order(self, order: str, request: gr.Request) -> Any:
        """Change the order of the rows. It is drawn at once only while nothing is timed."""
        self._orders.put(visitor(request), order)
        latest = self.lab.job.latest
        if latest is None or self.lab.job.running:
            return gr.skip()
        return self._draw(latest, visitor(request))

    def _file(self, status: JobStatus, who: str) -> Any:
        """A download of the table for this visitor."""
        if status.findings is None:
            return gr.DownloadButton(visible=False)
        with self.handlers.downloads.fresh(f"{who} flags") as folder:
            path = folder / FILE
            path.write_text(flags_table(status.findings).as_csv(), encoding="utf-8")
        return gr.DownloadButton(value=str(path), visible=True)

    def _stop(self, request: gr.Request) -> Any:
        self.handlers.stops.stop(visitor(request))
        self.lab.job.stop()
        return gr.Button(interactive=False)

    def _buttons(self, running: bool) -> Updates:
        return {self.button: gr.Button(interactive=not running), self.stop: gr.Button(interactive=running)}


def _part(status: JobStatus) -> tuple[int, bool]:
    """The number of whole blocks, and whether the first pass still runs."""
    state = status.progress
    return (state.blocks, state.phase.startswith("first pass")) if state else (0, True)


def _progress(text: str) -> str:
    """A live region. It is there before it has text, so that screen readers announce its changes."""
    return f'<p class="sl-small" role="status">{escape(text)}</p>'
