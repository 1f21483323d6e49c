"""Compare flags: the lab's experiment on the flags that are chosen, shown as it grows."""

import asyncio
from collections.abc import AsyncIterator
from html import escape
from typing import Any

import gradio as gr

from splitlearn.errors import SplitlearnError
from splitlearn.lab.analysis.flags_table import flags_table
from splitlearn.lab.job import JobStatus
from ui import html, inputs
from ui.compare.actions import Handlers
from ui.flag_table import view
from ui.flags.picker import Updates
from ui.lab.view import progress
from ui.lab.watch import Watches
from ui.visitors import visitor

TOKENS = "32"
FILE = "flags.csv"
DESIGNS = [("Leave each flag out", "without"), ("Each flag alone", "alone")]
TO_TABLE = """() => document.getElementById('ft-heading').scrollIntoView({block: 'start',
  behavior: matchMedia('(prefers-reduced-motion: reduce)').matches ? 'auto' : 'smooth'})"""
BUSY = (
    "Another visitor's comparison is running: two at once would measure each other. Press Compare flags again when it "
    "is done."
)


class FlagTable:
    """Made inside the Answers tab; `button` begins it, and `connect` makes it live."""

    def __init__(self, handlers: Handlers, button: Any) -> None:
        self.handlers, self.lab, self.button = handlers, handlers.lab, button
        self.watches = Watches(handlers.lab.job)
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
                view.ORDERS, value="listed", label="Order", info="Of the rows.", min_width=280, elem_id="ft-order"
            )
        self.progress = gr.HTML(_progress(""), elem_id="ft-progress")
        self.error = gr.HTML("", elem_id="ft-error")
        self.table = gr.HTML(view.section(None), elem_id="flag-table")
        with gr.Row():
            self.stop = gr.Button("Stop measuring flags", size="sm", interactive=False, scale=0, elem_id="ft-stop")
            self.csv = gr.DownloadButton("Table as CSV", size="sm", visible=False, scale=0, elem_id="ft-csv")

    def connect(self, prompt: Any, words: Any) -> None:
        """Make it live. `prompt` and `words` (the flags) are the Answers tab's fields."""
        drawn = [self.progress, self.error, self.table, self.button, self.stop, self.csv]
        given = [prompt, words, self.design, self.order]
        # One that waits holds no thread.
        self.button.click(None, None, None, js=TO_TABLE)
        self.button.click(self._start, given, drawn, concurrency_limit=None, show_progress="hidden")
        self.stop.click(self._stop, None, self.stop, queue=False, show_progress="hidden")
        self.order.input(self._order, self.order, self.table, show_progress="hidden")

    async def _start(
        self, prompt: str, words: str, design: str, order: str, request: gr.Request
    ) -> AsyncIterator[Updates]:
        """Say what it will take, begin, and follow it."""
        if self.handlers.runs.busy:
            yield {self.error: html.error(BUSY)}
            return
        typed = {**inputs.lab_at_first(self.handlers.runs.config.generation), "tokens": TOKENS}
        typed |= {"design": design, "limit": "decided"}
        yield {self.error: "", self.progress: _progress("Looking what it will take."), self.button: _button(False)}
        try:
            said = await asyncio.to_thread(self.lab.preflight, typed, words or "", prompt or "")
            yield {self.progress: _progress(" ".join(said))}
            await asyncio.to_thread(self.lab.start, typed, words or "", prompt or "")
        except SplitlearnError as error:
            yield {self.error: html.error(str(error)), self.progress: _progress(""), self.button: _button(True)}
            if not self.lab.job.running:
                return
        async for updates in self._follow(order, visitor(request), " ".join(said)):
            yield updates

    async def _follow(self, order: str, who: str, said: str) -> AsyncIterator[Updates]:
        """The table after each run, never while one is timed."""
        yield {self.stop: gr.Button(interactive=True), self.csv: gr.DownloadButton(visible=False)}
        async for status in self.watches.follow(who):
            updates: Updates = {self.progress: progress(status) + html.small(said)}
            if status.findings is not None:
                updates[self.table] = await asyncio.to_thread(self._draw, status, order)
            if status.ended:
                updates |= {self.button: _button(True), self.stop: gr.Button(interactive=False)}
                updates |= {self.error: html.error(status.error), self.csv: self._file(status, who)}
            yield updates

    def _draw(self, status: JobStatus, order: str) -> str:
        return view.section(flags_table(status.findings) if status.findings else None, order)

    def _order(self, order: str) -> str:
        latest = self.lab.job.latest
        return self._draw(latest, order) if latest else view.section(None)

    def _file(self, status: JobStatus, who: str) -> Any:
        """The table as a file for this visitor."""
        if status.findings is None:
            return gr.DownloadButton(visible=False)
        path = self.handlers.downloads.fresh(f"{who} flags") / FILE
        path.write_text(flags_table(status.findings).as_csv(), encoding="utf-8")
        return gr.DownloadButton(value=str(path), visible=True)

    def _stop(self) -> Any:
        self.lab.job.stop()
        return gr.Button(interactive=False)


def _button(interactive: bool) -> Any:
    return gr.Button(interactive=interactive)


def _progress(text: str) -> str:
    """A live region that is there before it speaks."""
    return f'<p class="sl-small" role="status">{escape(text)}</p>'
