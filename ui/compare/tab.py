"""The page: its parts, and which action each of them starts."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import gradio as gr

from splitlearn.arms.startup import MODEL, TRUNK
from splitlearn.checkpoints.chat_template import DEFAULT
from splitlearn.errors import InputError
from splitlearn.flags.selection import parse
from ui import inputs
from ui.compare import charts, view
from ui.compare.actions import Handlers
from ui.compare.session import ArmView, ComparisonView
from ui.flags import flag_words
from ui.flags.picker import Picker, Updates
from ui.lab.tab import LabTab, visitor
from ui.login import Sharing
from ui.trunk.tab import NAME, ServerTab

# Text fields, not gr.Number: that hands over an empty value for "x", and nobody could be told what was wrong.
NUMBERS = {
    "max_new_tokens": "Max new tokens",
    "temperature": "Temperature (0 is greedy)",
    "top_k": "Top-k (0 is off)",
    "top_p": "Top-p (1 is off)",
    "repetition_penalty": "Repetition penalty (1 is off)",
    "seed": "Seed",
    "samples": "Samples at once (with this seed and the next)",
}


TICK_S = 0.5
POLL_S = 0.1
# Calls that wait for their turn, of all visitors.
MOST_WAITING = 64


class Page:
    """One page of the program; `blocks` is what Gradio launches."""

    def __init__(self, handlers: Handlers, sharing: Sharing) -> None:
        self.handlers = handlers
        self.runs = handlers.runs
        self.sharing = sharing
        with gr.Blocks(title="splitlearn", analytics_enabled=False, fill_width=True) as self.blocks:
            self._top()
            self._tabs()
            self._connect()
        # Calls that go past the queue would run beside each other.
        self.blocks.queue(api_open=False, max_size=MOST_WAITING)

    def _top(self) -> None:
        """Head, prompt, buttons, and what is folded away."""
        gr.Markdown("# splitlearn: one prompt, full and split", elem_classes="sl-title")
        self.facts = gr.HTML(view.facts(self.runs.config, None), elem_id="facts")
        self.link = gr.HTML(view.note(self.sharing.message), elem_id="share-link")
        self.startup = gr.HTML("", elem_id="startup")
        self.timer = gr.Timer(TICK_S)
        settings = self.runs.config.generation
        self.fields = {"prompt": gr.Textbox(settings.prompt, label="Prompt", lines=2, max_lines=8, elem_id="prompt")}
        with gr.Row():
            self.compare = gr.Button("Compare", variant="primary", scale=3, min_width=160, elem_id="compare")
            self.stop = gr.Button("Stop", interactive=False, scale=1, min_width=80, elem_id="stop")
        self.error = gr.HTML("", elem_id="error")
        with gr.Row(elem_id="folded"):
            with gr.Accordion("Settings", open=False, elem_id="settings"):
                self._settings()
            with gr.Accordion("Optimization flags", open=False, elem_id="flags"):
                self.matrix = gr.HTML(render=False, elem_id="matrix")
                self.picker = Picker(self.matrix, self.runs.config.flags)

    def _settings(self) -> None:
        generation = self.runs.config.generation
        first = inputs.at_first(generation)
        with gr.Row():
            for name, label in NUMBERS.items():
                self.fields[name] = gr.Textbox(first[name], label=label, min_width=240, elem_id=name)
        self.fields["form"] = gr.Radio(
            inputs.forms(_named(generation.chat)), value=inputs.form(generation.chat), label="Prompt as"
        )
        self.fields["ignore_eos"] = gr.Checkbox(label="Ignore the end token: always generate to the limit")
        self.fields["stop"] = gr.Textbox(label="Stop strings, one on each line", lines=2)
        self.split_facts = gr.HTML("", elem_id="split-facts")

    def _tabs(self) -> None:
        with gr.Tabs(selected="answers", overflow_behavior="wrap") as self.tabs:
            with gr.Tab("Answers", id="answers"):
                with gr.Row(equal_height=True):
                    with gr.Column(min_width=320):
                        self.full = gr.HTML(view.card(ArmView("full")), elem_id="full")
                    with gr.Column(min_width=320):
                        self.split = gr.HTML(view.card(ArmView("split")), elem_id="split")
                self.result = gr.HTML("", elem_id="result")
                self.plot = gr.Plot(show_label=False, container=False, visible=False, elem_id="ledger")
                self.ledger = gr.HTML("", elem_id="ledger-table")
            with gr.Tab("Lab", id="lab") as tab:
                self.lab = LabTab(self.handlers.lab, tab, self.runs.config.generation)
            with gr.Tab(NAME, id="server"):
                self.server = ServerTab(self.handlers.monitor)
            with gr.Tab("Flags by side", id="matrix-tab"):
                self.matrix.render()

    def _connect(self) -> None:
        self.picker.connect(self.runs)
        seen = [self.link, self.startup, self.timer]
        read = [self.facts, self.split_facts, self.fields["form"], self.error]
        # Each page that is opened while the model is loaded has one of these waiting. One that waits holds no thread.
        self.blocks.load(
            self._open,
            None,
            [*self.picker.outputs, *seen, *read],
            show_progress="hidden",
            concurrency_limit=None,
        )
        self.blocks.unload(self._leave)
        self.timer.tick(self._see, None, seen, show_progress="hidden", concurrency_limit=None)
        self.stop.click(self._stop, None, self.stop, queue=False, show_progress="hidden")
        drawn = [self.full, self.split, self.result, self.plot, self.ledger, self.error]
        compare = [self.compare.click, self.fields["prompt"].submit]
        self._action(compare, self._compare, self._begin_compare, {*self.fields.values(), self.picker.words}, drawn)
        self.server.connect(self.tabs)
        self.lab.connect(self.picker.words, self.fields["prompt"], self.error)

    def _action(
        self, triggers: list[Any], run: Callable[..., Any], begin: Callable[..., Any], given: set[Any], drawn: list[Any]
    ) -> None:
        """Begin at once, run when no other visitor's run is under way, and set the buttons back whatever happened."""
        buttons = [self.compare, self.stop]
        begun = gr.on(
            triggers,
            begin,
            None,
            [*buttons, *drawn, self.tabs, self.timer, self.server.timer],
            queue=False,
            show_progress="hidden",
        )
        ran = begun.then(
            run, given, drawn, concurrency_id="runs", concurrency_limit=1, show_progress="hidden", trigger_mode="once"
        )
        ran.then(lambda: _buttons(buttons, running=False), None, buttons, queue=False, show_progress="hidden")

    async def _open(self) -> AsyncIterator[Updates]:
        """A page was opened: what is known of the model once it is read, then the flags that can be applied once the
        trunk has been asked. The words of the flags are there already, and a quick visitor may have typed others."""
        yield self._see()
        while not self.handlers.startup.settled(MODEL):
            await asyncio.sleep(POLL_S)
        yield await asyncio.to_thread(self._read)
        while not self.handlers.startup.settled(MODEL, TRUNK):
            await asyncio.sleep(POLL_S)
        yield await asyncio.to_thread(self._flags)

    def _read(self) -> Updates:
        """What is known of the model."""
        if self.handlers.startup.failure:
            return self._see()
        model, config = self.runs.model, self.runs.config
        return {
            **self._see(),
            self.facts: view.facts(config, model),
            self.split_facts: view.split_facts(config, model),
            self.fields["form"]: gr.Radio(inputs.forms(model.capabilities.chat_templates)),
        }

    def _flags(self) -> Updates:
        """The flags as they are available now, as the configuration has them."""
        if self.handlers.startup.failure:
            return self._see()
        known, said = flag_words.available(self.runs), {}
        try:
            flags = parse(self.runs.config.flags, known)
        except InputError as error:  # a flag that config.yaml names and that cannot be applied here now
            flags, said = parse("auto", known), {self.picker.words: "auto", self.error: view.error(str(error))}
        return {**self.picker.show(flags, known, self.runs.config.flags), **self._see(), **said}

    def _leave(self, request: gr.Request) -> None:
        self.handlers.leave(visitor(request))
        self.lab.leave(visitor(request))

    def _see(self) -> Updates:
        """What goes on in the background."""
        startup = self.handlers.startup
        running = startup.running
        return {
            self.link: view.note(self.sharing.message),
            self.startup: view.startup(startup.parts(), running),
            self.timer: gr.Timer(active=running or self.sharing.state == "asked"),
        }

    def _stop(self, request: gr.Request) -> Any:
        self.handlers.stops.stop(visitor(request))
        return gr.Button(interactive=False)

    def _begin_compare(self, request: gr.Request) -> Updates:
        self.handlers.stops.begin(visitor(request))
        waiting = {self.full: view.card(ArmView("full", "waiting")), self.split: view.card(ArmView("split", "waiting"))}
        empty = {self.result: "", self.plot: gr.Plot(visible=False), self.ledger: "", self.error: ""}
        buttons = _buttons([self.compare, self.stop], running=True)
        return {
            **waiting,
            **empty,
            **buttons,
            self.tabs: gr.Tabs(selected="answers"),
            self.timer: gr.Timer(active=True),
            self.server.timer: gr.Timer(active=False),
        }

    def _typed(self, given: dict[Any, Any]) -> dict[str, Any]:
        return {name: given[component] for name, component in self.fields.items()}

    def _compare(self, given: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """Draw only what changed."""
        before, words = ComparisonView(), given[self.picker.words] or ""
        for shown in self.handlers.compare(self._typed(given), words, visitor(request)):
            yield self._changes(before, shown, words)
            before = shown

    def _changes(self, before: ComparisonView, shown: ComparisonView, words: str) -> Updates:
        updates: Updates = {self.error: view.errors(shown)}
        if shown.full != before.full or shown.error:
            updates[self.full] = view.card(shown.full)
        if shown.split != before.split or shown.error:
            updates[self.split] = view.card(shown.split)
        if shown.both is not None:
            said = view.result(shown, words)
            updates[self.result] = said + view.prompt(shown)
            updates[self.plot] = gr.Plot(charts.ledger(*shown.both), visible=True)
            updates[self.ledger] = charts.legend(*shown.both)
        return updates


def _named(chat: bool | str) -> tuple[str, ...]:
    """The chat template that the configuration names: the only one that is known before the model is read."""
    return (DEFAULT, chat) if isinstance(chat, str) else ()


def _buttons(buttons: list[Any], running: bool) -> Updates:
    """Compare, while nothing runs; stop, while something does."""
    compare, stop = buttons
    return {compare: gr.Button(interactive=not running), stop: gr.Button(interactive=running)}
