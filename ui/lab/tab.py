"""The Lab tab: its components and their event handlers.

It draws only when the experiment reports progress, which is between two runs and never while one is timed.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr

from splitlearn.arms.compare import KINDS
from splitlearn.config import GenerationConfig
from splitlearn.errors import SplitlearnError
from splitlearn.lab.analysis.findings import METRICS
from splitlearn.lab.job import JobStatus
from splitlearn.lab.report import charts
from ui import html, inputs
from ui.flags.picker import Updates
from ui.lab.actions import ExperimentView, Lab
from ui.lab.view import breakdown_key, details, progress, report, so_far
from ui.visitors import visitor
from ui.watch import Watches

HELP = (
    "Measures the effect of each chosen flag, in full and in split. Every block runs each arm once, in random order, "
    "up to the token limit. It goes on when this page is closed."
)
EMPTY = (
    "No experiment yet. Press Start: the first pass takes about two minutes, then verdicts come block by block. "
    "Experiments stay on this machine and are listed here."
)
DESIGNS = [("All flags but one", "without"), ("Each flag alone", "alone"), ("Ladder: one after another", "ladder")]
LIMITS = [("Until every verdict is decided", "decided"), ("A fixed number of pairs", "pairs")]
EXPORTS = ("report.html", "results.json", "verdicts.csv", "pairs.csv", "trials.csv")
DRAW: dict[str, Callable[..., Any]] = {
    "forest": charts.forest,
    "dots": charts.dots,
    "ledger": charts.breakdown,
}
NUMBERS = {
    "minutes": ("Minutes at most", "It ends then, decided or not."),
    "pairs": ("Pairs", "For a fixed number: runs of each arm."),
    "delta": ("Delta", "A ratio this near to 1 is no effect."),
    "tokens": ("Tokens of each run", "More tokens make TPOT more precise."),
    "order_seed": ("Seed of the order", "The same seed gives the same order of runs."),
    "ttft_ms": ("TTFT under, ms", "Slower runs miss the service level."),
    "decode_tps": ("Tokens per second, more than", "Slower runs miss the service level."),
}


class LabTab:
    """The tab's components, built inside `tab`. `connect` adds their event handlers."""

    def __init__(self, lab: Lab, tab: Any, generation: GenerationConfig) -> None:
        self.lab, self.tab = lab, tab
        self.fields: dict[str, Any] = {}
        self.watches = Watches(lab.job)
        self._question(inputs.lab_at_first(generation))
        self._saved(inputs.lab_at_first(generation))
        self._results()

    def _question(self, first: dict[str, str]) -> None:
        gr.HTML(f'<p class="sl-small">{HELP}</p>')
        with gr.Row():
            self.fields["design"] = gr.Radio(
                DESIGNS, value="without", label="Design", info="What each flag is compared with.", min_width=300
            )
            self.fields["limit"] = gr.Radio(
                LIMITS,
                value="decided",
                label="How long",
                info="Until the intervals decide, or a fixed number.",
                min_width=300,
            )
        with gr.Accordion("Advanced: limits, delta, tokens, prompts", open=False, elem_id="lab-advanced"):
            with gr.Row():
                for name in ("minutes", "pairs", "delta", "tokens", "order_seed"):
                    self._text(name, first)
            self.fields["prompts"] = gr.Textbox(
                first["prompts"],
                label="Prompts",
                info="One per line. Empty: the prompt of the Answers tab.",
                lines=2,
                elem_id="prompts",
            )
        with gr.Row():
            self.start = gr.Button("Start", variant="primary", scale=3, min_width=160, elem_id="lab-start")
            self.stop = gr.Button("Stop", interactive=False, scale=1, min_width=80, elem_id="lab-stop")
        self.progress = gr.HTML("", elem_id="lab-progress")

    def _text(self, name: str, first: dict[str, str]) -> None:
        label, info = NUMBERS[name]
        self.fields[name] = gr.Textbox(first[name], label=label, info=info, elem_id=f"lab-{name}", min_width=160)

    def _saved(self, first: dict[str, str]) -> None:
        self.none = gr.HTML(html.small(EMPTY))
        with gr.Row(equal_height=False, visible=False) as self.saved:
            self.chosen = self._list("Experiments", "Measured on this machine.", "lab-chosen")
            self.other = self._list("Beside", "Another experiment to compare it with.", "lab-other")
            self.resume = gr.Button("Resume", interactive=False, scale=1, min_width=80, elem_id="lab-resume")
        with gr.Accordion("Service level", open=False, elem_id="lab-levels"), gr.Row():
            for name in ("ttft_ms", "decode_tps"):
                self._text(name, first)

    def _list(self, label: str, info: str, name: str) -> Any:
        return gr.Dropdown([], value=None, label=label, info=info, scale=3, min_width=280, elem_id=name)

    def _results(self) -> None:
        self.beside = gr.Markdown("", elem_id="lab-beside", elem_classes="sl-beside")
        self.report = gr.HTML("", elem_id="lab-report", elem_classes="sl-report")
        self.pictures: dict[tuple[str, ...], Any] = {}
        with gr.Column(visible=False) as self.drawn:
            for what, heading in (("forest", "Intervals"), ("dots", "All pairs")):
                gr.HTML(f"<h2>{heading}</h2>", elem_classes="sl-report")
                for metric in METRICS:
                    self._plots([(what, kind, metric) for kind in KINDS])
            self.key = gr.HTML("", elem_classes="sl-report")
            self._plots([("ledger", kind) for kind in KINDS])
            self.details = gr.HTML("", elem_id="lab-details", elem_classes="sl-report")
            with gr.Row():
                self.files = {
                    name: gr.DownloadButton(name, size="sm", min_width=120, elem_id=_id(name)) for name in EXPORTS
                }

    def _plots(self, keys: list[tuple[str, ...]]) -> None:
        with gr.Row():
            for key in keys:
                name = "-".join(("lab", *key))
                self.pictures[key] = gr.Plot(show_label=False, container=False, min_width=320, elem_id=name)

    def connect(self, words: Any, prompt: Any, error: Any) -> None:
        """Add the event handlers. `words` (the chosen flags), `prompt` and `error` are the page's components."""
        self.words, self.prompt, self.error = words, prompt, error
        given = {*self.fields.values(), words, prompt, self.chosen, self.other}
        shown = [self.beside, self.report, self.drawn, *self.pictures.values(), self.key, self.details]
        changed = [self.progress, *shown, *self.files.values(), *self._controls, error]
        # Each open page waits in one of these while an experiment runs. They are async, so waiting holds no thread.
        self.tab.select(self._come, given, changed, concurrency_limit=None)
        self.start.click(self._start, given, changed, concurrency_limit=None)
        self.resume.click(self._resume, given, changed, concurrency_limit=None)
        self.stop.click(self._stop, None, self.stop, queue=False)
        self.chosen.input(self._open, given, changed, trigger_mode="always_last")
        levels = [self.fields["ttft_ms"].submit, self.fields["decode_tps"].submit]
        gr.on(levels, self._open, given, changed, trigger_mode="always_last")
        self.other.input(self._compare, given, [self.beside, error], trigger_mode="always_last")

    @property
    def _controls(self) -> list[Any]:
        return [self.start, self.stop, self.none, self.saved, self.resume, self.chosen, self.other]

    async def _come(self, given: dict[Any, Any], request: gr.Request) -> AsyncIterator[Updates]:
        """On opening the tab: show the running experiment, or the chosen one, or the last one."""
        latest = self.lab.job.latest
        if self.lab.job.running or (latest is not None and given[self.chosen] is None):
            async for updates in self._follow(given, request):
                yield updates
            return
        name = given[self.chosen]
        opened = await asyncio.to_thread(self._opened, name, given, request) if name else {}
        updates = {**self._idle(name), **opened}
        if not self.lab.job.running:  # none was started meanwhile
            yield updates

    async def _start(self, given: dict[Any, Any], request: gr.Request) -> AsyncIterator[Updates]:
        typed = self._typed(given)
        act = self._act(
            lambda: self.lab.start(typed, given[self.words] or "", given[self.prompt] or ""), given, request
        )
        async for updates in act:
            yield updates

    async def _resume(self, given: dict[Any, Any], request: gr.Request) -> AsyncIterator[Updates]:
        async for updates in self._act(lambda: self.lab.resume(given[self.chosen]), given, request):
            yield updates

    async def _act(self, act: Callable[[], None], given: dict[Any, Any], request: gr.Request) -> AsyncIterator[Updates]:
        """Run `act` and follow the experiment. If `act` fails, show why and follow the running experiment, if any."""
        try:
            await asyncio.to_thread(act)
            yield {self.error: ""}
        except SplitlearnError as error:
            yield {self.error: html.error(str(error))}
            if not self.lab.job.running:
                return
        async for updates in self._follow(given, request):
            yield updates

    async def _follow(self, given: dict[Any, Any], request: gr.Request) -> AsyncIterator[Updates]:
        """Follow the experiment until it ends, the page is closed, or the page follows it again."""
        before = None
        async for status in self.watches.follow(visitor(request)):
            if status.ended:
                yield await asyncio.to_thread(self._ended, status, given, request)
            else:
                yield self._running(before, status)
            before = status

    def _running(self, before: JobStatus | None, status: JobStatus) -> Updates:
        """Draw little: the progress each time, the verdicts with each block."""
        updates: Updates = {self.progress: progress(status)}
        if before is None or before.folder != status.folder:
            lists = dict.fromkeys((self.chosen, self.other), gr.Dropdown(interactive=False))
            updates |= {**self._empty(), **lists, self.resume: gr.Button(interactive=False)}
            updates |= {self.start: gr.Button(interactive=False), self.stop: gr.Button(interactive=True)}
            updates[self.none] = gr.HTML(visible=False)
        if status.findings is not None and (before is None or before.findings is not status.findings):
            updates[self.report] = so_far(status.findings)
        return updates

    def _ended(self, status: JobStatus, given: dict[Any, Any], request: gr.Request) -> Updates:
        name = status.folder.name
        failure = {self.error: html.error(status.error)} if status.error else {}
        drawn = {**self._opened(name, given, request), **failure}
        return {**self._idle(name), **drawn, self.progress: progress(status)}

    def _open(self, given: dict[Any, Any], request: gr.Request) -> Updates:
        """Show the chosen experiment with the service level. Without a choice, only check the service level."""
        name = given[self.chosen]
        if self.lab.job.running:  # the list may still be open on another page
            return {self.error: ""}
        if name is None:
            return self._checked(given)
        return {**self._idle(name), self.error: "", self.progress: "", **self._opened(name, given, request)}

    def _checked(self, given: dict[Any, Any]) -> Updates:
        try:
            inputs.service_level(self._typed(given))
        except SplitlearnError as error:
            return {self.error: html.error(str(error))}
        return {self.error: ""}

    def _opened(self, name: str, given: dict[Any, Any], request: gr.Request) -> Updates:
        """Show the report of the experiment called `name`, or the error."""
        try:
            return {**self._draw(self.lab.open(name, self._typed(given), visitor(request))), self.beside: ""}
        except SplitlearnError as error:
            return {self.error: html.error(str(error))}

    def _compare(self, given: dict[Any, Any]) -> Updates:
        """Show the comparison of the two chosen experiments."""
        try:
            text = self.lab.compare(given[self.chosen], given[self.other], self._typed(given))
            return {self.beside: text, self.error: ""}
        except SplitlearnError as error:
            return {self.error: html.error(str(error))}

    def _stop(self) -> Any:
        self.lab.job.stop()
        return gr.Button(interactive=False)

    def _typed(self, given: dict[Any, Any]) -> dict[str, Any]:
        return {name: given[component] for name, component in self.fields.items()}

    def _idle(self, name: str | None) -> Updates:
        """Update the controls for when no experiment runs, with `name` chosen."""
        saved = self.lab.saved()
        choices = [(each.label, each.folder.name) for each in saved]
        unfinished = any(each.folder.name == name and each.finished is None for each in saved)
        return {
            self.start: gr.Button(interactive=True),
            self.stop: gr.Button(interactive=False),
            self.none: gr.HTML(visible=not saved),
            self.saved: gr.Row(visible=bool(saved)),
            self.resume: gr.Button(interactive=unfinished),
            self.chosen: gr.Dropdown(choices=choices, value=name, interactive=True),
            self.other: gr.Dropdown(choices=choices, value=None, interactive=True),
        }

    def _draw(self, opened: ExperimentView) -> Updates:
        """Draw the whole report."""
        found = opened.findings
        plots = {plot: gr.Plot(DRAW[what](found, *how)) for (what, *how), plot in self.pictures.items()}
        files = {button: gr.DownloadButton(value=str(opened.files[name])) for name, button in self.files.items()}
        texts = {self.report: report(found), self.key: breakdown_key(found)}
        return {**plots, **files, **texts, self.details: details(found), self.drawn: gr.Column(visible=True)}

    def _empty(self) -> Updates:
        """Clear the report."""
        return {self.beside: "", self.report: "", self.drawn: gr.Column(visible=False)}


def _id(name: str) -> str:
    return f"lab-{name.replace('.', '-')}"
