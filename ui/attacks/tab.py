"""The tab "What the server reads": attacks on a visitor's prompt, in the queue of all runs, and a sweep beside them."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import gradio as gr

from splitlearn.errors import InputError, SplitlearnError
from splitlearn.privacy import charts
from splitlearn.privacy.live import Item
from splitlearn.privacy.sweep_job import SweepStatus
from splitlearn.privacy.victims import built_in
from splitlearn.runtime.progress import Step
from ui import html
from ui.attacks import view
from ui.attacks.actions import CUTS, DEFENCES, FILE, PROMPTS, Attacks, as_csv
from ui.flags.picker import Updates
from ui.model import cuts
from ui.visitors import Downloads, visitor
from ui.watch import Watches

NAME = "What the server reads"
LABELS = {"splits": "Layers before the trunk", "limit": "Prompts", "defences": "Defence"}
KINDS = {"names": "Names and numbers", "prose": "Prose", "code": "Code", "chinese": "Chinese"}
SWEEP = (
    "The same attacks on prompts that come with the program, of four kinds, at several cuts. Results stay on this "
    "machine: each cut is measured once."
)
SPEAKS = "element.setAttribute('role', 'status')"


class AttacksTab:
    """The tab's components, built inside `tab`. `connect` adds their event handlers."""

    def __init__(self, attacks: Attacks, downloads: Downloads, tab: Any) -> None:
        self.attacks, self.tab, self._downloads = attacks, tab, downloads
        self.watches = Watches(attacks.job)
        self.fields: dict[str, Any] = {}
        self.asked: dict[str, Any] = {}
        self._ask()
        self.readings = gr.HTML("", elem_id="attacks-readings", elem_classes="sl-report")
        self._sweep()

    def _ask(self) -> None:
        gr.HTML(f'<h2>Your prompt</h2><p class="sl-small">{view.WHAT}</p>', elem_classes="sl-report")
        self.fields["prompt"] = gr.Textbox(
            _examples()["names"],
            label="Prompt",
            info="It is read as it is, without a chat template. Empty: the prompt of the Answers tab.",
            lines=2,
            max_lines=8,
            elem_id="attacks-prompt",
        )
        with gr.Row(elem_classes="sl-examples"):
            self.examples = {kind: gr.Button(label, size="sm", min_width=80, scale=0) for kind, label in KINDS.items()}
        with gr.Row():
            self.fields["splits"] = gr.Textbox(
                "", label="Layers before the trunk", info="Empty: the cut in use.", min_width=200, elem_id="attacks-cut"
            )
            self.fields["defence"] = gr.Dropdown(
                DEFENCES, value=DEFENCES[0], label="Defence", info="Of the client. The attacks know it.", min_width=280
            )
        with gr.Row():
            self.read = gr.Button("Read it", variant="primary", scale=3, min_width=160, elem_id="attacks-read")
            self.stop = gr.Button("Stop", interactive=False, scale=1, min_width=80, elem_id="attacks-stop")
        self.status = gr.HTML("", js_on_load=SPEAKS, elem_id="attacks-status")
        self.error = gr.HTML("", elem_id="attacks-error")

    def _sweep(self) -> None:
        gr.HTML(f'<h2>Against the depth of the cut</h2><p class="sl-small">{SWEEP}</p>', elem_classes="sl-report")
        with gr.Row():
            self.asked["cuts"] = gr.Textbox(
                "",
                label="Cuts",
                info=f"Layers before the trunk, with commas. Empty: {', '.join(map(str, CUTS))}.",
                min_width=240,
                elem_id="sweep-cuts",
            )
            self.asked["limit"] = gr.Textbox(
                str(PROMPTS), label="Prompts", info="How many of them.", min_width=120, elem_id="sweep-limit"
            )
        self.asked["defences"] = gr.CheckboxGroup(
            DEFENCES, value=["none", "wire_dtype=int8"], label="Defences", info="Each is measured.", min_width=280
        )
        with gr.Row():
            self.start = gr.Button("Measure", variant="primary", scale=3, min_width=160, elem_id="sweep-start")
            self.end = gr.Button("Stop measuring", interactive=False, scale=1, min_width=120, elem_id="sweep-stop")
        self.progress = gr.HTML("", js_on_load=SPEAKS, elem_id="sweep-progress")
        self.sweep_error = gr.HTML("", elem_id="sweep-error")
        self.curve = gr.Plot(show_label=False, container=False, visible=False, elem_id="sweep-curve")
        self.table = gr.HTML(html.small(view.NO_SWEEP), elem_id="sweep-table")
        self.command = gr.HTML("", elem_id="sweep-command", elem_classes="sl-report")
        self.csv = gr.DownloadButton("Table as CSV", size="sm", visible=False, scale=0, elem_id="sweep-csv")

    def connect(self, prompt: Any) -> None:
        """Add the event handlers. `prompt` is that of the Answers tab."""
        self.prompt = prompt
        for kind, button in self.examples.items():
            button.click(None, None, self.fields["prompt"], js=f"() => {json.dumps(_examples()[kind])}")
        given, buttons = {*self.fields.values(), prompt}, [self.read, self.stop]
        begun = self.read.click(self._begin, None, [*buttons, self.status, self.error, self.readings], queue=False)
        drawn = [self.status, self.error, self.readings]
        ran = begun.then(self._read, given, drawn, concurrency_id="runs", concurrency_limit=1, trigger_mode="once")
        ran.then(self._end, None, [*buttons, self.status], queue=False)
        self.stop.click(self._stop, None, self.stop, queue=False)
        # Each open page waits in one of these while a sweep runs. They are async, so waiting holds no thread.
        self.tab.select(self._come, None, self.swept, concurrency_limit=None)
        self.start.click(self._start, {*self.asked.values()}, self.swept, concurrency_limit=None)
        self.end.click(self._stop_sweep, None, self.end, queue=False)

    @property
    def swept(self) -> list[Any]:
        """The components that show a sweep."""
        shown = [self.progress, self.sweep_error, self.curve, self.table, self.command, self.csv]
        return [*shown, self.start, self.end]

    def _begin(self, request: gr.Request) -> Updates:
        place = self.attacks.planner.begin(visitor(request))
        return {
            self.read: gr.Button(interactive=False),
            self.stop: gr.Button(interactive=True),
            self.status: cuts.turn(place),
            self.error: "",
            self.readings: "",
        }

    def _read(self, given: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """Show each attack as it ends."""
        typed = {name: given[field] for name, field in self.fields.items()}
        typed["prompt"] = typed["prompt"] or given[self.prompt]
        found = list[Item]()
        try:
            for item in self.attacks.attack(typed, visitor(request)):
                if isinstance(item, Step):
                    yield {self.status: view.progress(item)}
                else:
                    found.append(item)
                    yield {self.readings: view.readings(found)}
        except SplitlearnError as error:
            yield {self.error: _error(error)}

    def _end(self, request: gr.Request) -> Updates:
        self.attacks.planner.line.leave(visitor(request))
        return {self.read: gr.Button(interactive=True), self.stop: gr.Button(interactive=False), self.status: ""}

    def _stop(self, request: gr.Request) -> Any:
        self.attacks.planner.stops.stop(visitor(request))
        return gr.Button(interactive=False)

    async def _come(self, request: gr.Request) -> AsyncIterator[Updates]:
        """On opening the tab: show what was measured, and the sweep that runs."""
        yield await asyncio.to_thread(self._drawn, request)
        async for updates in self._follow(request):
            yield updates

    async def _start(self, given: dict[Any, Any], request: gr.Request) -> AsyncIterator[Updates]:
        typed = {name: given[field] for name, field in self.asked.items()}
        try:
            await asyncio.to_thread(self.attacks.sweep, typed)
            yield {self.sweep_error: ""}
        except SplitlearnError as error:
            yield {self.sweep_error: _error(error)}
            if not self.attacks.job.running:
                return
        async for updates in self._follow(request):
            yield updates

    async def _follow(self, request: gr.Request) -> AsyncIterator[Updates]:
        """Follow the sweep until it ends, the page is closed, or the page follows it again."""
        before: SweepStatus | None = None
        async for status in self.watches.follow(visitor(request)):
            updates = self._sweeping(status)
            if status.ended or before is None or status.step.label != before.step.label:  # a cut's attack is done
                updates |= await asyncio.to_thread(self._drawn, request)
            before = status
            yield updates

    def _sweeping(self, status: SweepStatus) -> Updates:
        return {
            self.progress: view.sweep_progress(status),
            self.command: view.command(status),
            **({self.sweep_error: html.error(status.error)} if status.error else {}),
            self.start: gr.Button(interactive=bool(status.ended)),
            self.end: gr.Button(interactive=not status.ended),
        }

    def _drawn(self, request: gr.Request) -> Updates:
        """Draw what sweeps have found so far."""
        try:
            lines = self.attacks.job.lines()
            table = view.sweep(lines, self.attacks.client)
        except SplitlearnError as error:
            return {self.sweep_error: html.error(str(error))}
        if not any(line.cut for line in lines):
            return {self.table: table, self.curve: gr.Plot(visible=False), self.csv: gr.DownloadButton(visible=False)}
        with self._downloads.fresh(f"{visitor(request)} sweep") as folder:
            path = folder / FILE
            path.write_text(as_csv(lines), encoding="utf-8")
        return {
            self.table: table,
            self.curve: gr.Plot(charts.depth(lines), visible=True),
            self.csv: gr.DownloadButton(value=str(path), visible=True),
        }

    def _stop_sweep(self) -> Any:
        self.attacks.job.stop()
        return gr.Button(interactive=False)


def _examples() -> dict[str, str]:
    """The first of the built-in prompts of each kind."""
    return {victim.kind: victim.prompt for victim in reversed(built_in())}


def _error(error: SplitlearnError) -> str:
    """By the field's label."""
    if isinstance(error, InputError):
        error = InputError(LABELS.get(error.field, error.field), error.value, error.expected)
    return html.error(str(error))
