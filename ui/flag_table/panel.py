"""Compare flags: the lab's experiment on the flags that are chosen, shown as it grows.

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
from ui.flags.picker import Updates
from ui.lab.view import progress
from ui.lab.watch import Watches
from ui.visitors import MOST_SIGNALS, LeastRecent, visitor

MOST_TOKENS = 32
FILE = "flags.csv"
DESIGNS = [("Leave each flag out", "without"), ("Each flag alone", "alone")]
TO_TABLE = """() => document.getElementById('ft-heading').scrollIntoView({block: 'start',
  behavior: matchMedia('(prefers-reduced-motion: reduce)').matches ? 'auto' : 'smooth'})"""
BUSY = (
    "A comparison is running, yours or another visitor's: two at once would measure each other. Press Compare flags "
    "again when it is done."
)
OTHER = "Another experiment runs already, another visitor's or one of the Lab tab. This is what it finds."
LOADING = "The model is being loaded; the measurement begins by itself afterwards."


class FlagTable:
    """Made inside the Answers tab; `button` begins it, and `connect` makes it live."""

    def __init__(self, handlers: Handlers, button: Any) -> None:
        self.handlers, self.lab, self.button = handlers, handlers.lab, button
        self.watches = Watches(handlers.lab.job)
        self._orders: LeastRecent[str] = LeastRecent(MOST_SIGNALS)
        gr.HTML("<h2>What each flag brings</h2>", elem_id="ft-heading")
        with gr.Row():
            self.design = gr.Radio(
                DESIGNS,
                value="without",
                label="Question",
                info="What a row stands for.",
                min_width=280,
                elem_id="ft-design",
            )
            self.order = gr.Radio(
                view.ORDERS,
                value="listed",
                label="Order",
                info="While it measures, from the next run on.",
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
        """What an experiment is shown in."""
        return [self.progress, self.error, self.table, self.changes, self.button, self.stop, self.csv]

    def connect(self, prompt: Any, words: Any) -> None:
        """Make it live. `prompt` and `words` (the flags) are the Answers tab's fields."""
        given = [prompt, words, self.design]
        # One that waits holds no thread.
        self.button.click(None, None, None, js=TO_TABLE)
        self.button.click(self._start, given, self.drawn, concurrency_limit=None, show_progress="hidden")
        self.stop.click(self._stop, None, self.stop, queue=False, show_progress="hidden")
        self.order.input(self._order, self.order, self.table, queue=False, show_progress="hidden")

    async def come(self, request: gr.Request) -> AsyncIterator[Updates]:
        """The page was opened: show the experiment that runs, or the last one."""
        yield {self.error: ""}  # Gradio empties the outputs of a call that yields nothing
        async for updates in self._follow(visitor(request), ""):
            yield updates

    async def _start(self, prompt: str, words: str, design: str, request: gr.Request) -> AsyncIterator[Updates]:
        """Say what it will take, begin, and follow it."""
        who, said = visitor(request), ""
        if self.lab.job.running:
            yield {self.error: html.error(OTHER)}
        else:
            self.handlers.stops.begin(who)
            yield {self.error: "", self.progress: _progress(LOADING), **self._buttons(True)}
            asked = (self._typed(design), words or "", prompt or "")
            try:
                await asyncio.to_thread(self._load, who)
                said = " ".join(await asyncio.to_thread(self.lab.preflight, *asked))
                yield {self.progress: _progress(said)}
                if not self.handlers.stops.signal(who).is_set():
                    await asyncio.to_thread(self.lab.start, *asked)
            except SplitlearnError as error:
                yield {self.error: html.error(str(error))}
            if not self.lab.job.running:
                yield {self.progress: _progress(""), **self._buttons(False)}
                return
        async for updates in self._follow(who, said):
            yield updates

    def _load(self, who: str) -> None:
        """Wait for the model. Raises SetupError while a comparison runs or waits for its turn."""
        if self.handlers.line.taken or (self.handlers.runs.busy and not self.handlers.startup.running):
            raise SetupError(BUSY)
        self.handlers.startup.begin()
        self.handlers.startup.wait(self.handlers.stops.signal(who))

    def _typed(self, design: str) -> dict[str, Any]:
        """The lab's usual settings, but shorter runs."""
        usual = inputs.lab_at_first(self.handlers.runs.config.generation)
        tokens = str(min(int(usual["tokens"]), MOST_TOKENS))
        return {**usual, "tokens": tokens, "design": design, "limit": "decided"}

    async def _follow(self, who: str, said: str) -> AsyncIterator[Updates]:
        """The table after each run, to the end of the experiment."""
        before = None
        async for status in self.watches.follow(who):
            yield await asyncio.to_thread(self._updates, before, status, who, said)
            before = status

    def _updates(self, before: JobStatus | None, status: JobStatus, who: str, said: str) -> Updates:
        """Figures after each run. What a person unfolds, and the file, after each block: drawing anew folds it."""
        updates: Updates = {self.progress: progress(status) + html.small(said)}
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
        """Another order of the rows; drawn at once only while nothing is timed."""
        self._orders.put(visitor(request), order)
        latest = self.lab.job.latest
        if latest is None or self.lab.job.running:
            return gr.skip()
        return self._draw(latest, visitor(request))

    def _file(self, status: JobStatus, who: str) -> Any:
        """The table as a file for this visitor."""
        if status.findings is None:
            return gr.DownloadButton(visible=False)
        path = self.handlers.downloads.fresh(f"{who} flags") / FILE
        path.write_text(flags_table(status.findings).as_csv(), encoding="utf-8")
        return gr.DownloadButton(value=str(path), visible=True)

    def _stop(self, request: gr.Request) -> Any:
        self.handlers.stops.stop(visitor(request))
        self.lab.job.stop()
        return gr.Button(interactive=False)

    def _buttons(self, running: bool) -> Updates:
        return {self.button: gr.Button(interactive=not running), self.stop: gr.Button(interactive=running)}


def _part(status: JobStatus) -> tuple[int, bool]:
    """Which part of the experiment it is: so many whole blocks, and whether it is still the first pass."""
    state = status.progress
    return (state.blocks, state.phase.startswith("first pass")) if state else (0, True)


def _progress(text: str) -> str:
    """A live region that is there before it speaks."""
    return f'<p class="sl-small" role="status">{escape(text)}</p>'
