"""The Answers tab: one prompt through both arms."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from splitlearn.checkpoints.chat_template import DEFAULT
from splitlearn.config import ModelConfig
from splitlearn.errors import SplitlearnError
from splitlearn.flags.registry import Place
from ui import html, inputs
from ui.compare import time, view
from ui.compare.actions import Handlers
from ui.compare.examples import EXAMPLES
from ui.compare.progress import progress
from ui.compare.session import ArmView, ComparisonView
from ui.flag_table.panel import FlagTable
from ui.flags.picker import Picker, Updates
from ui.history.panel import HistoryPanel
from ui.network import view as network
from ui.network.panel import NetworkPanel
from ui.visitors import visitor

# Text fields, not gr.Number: that sends an empty value for "x", and the error could not name it.
NUMBERS = {
    "max_new_tokens": ("Max new tokens", "The longest answer, in tokens."),
    "temperature": ("Temperature", "0 always takes the likeliest token; above 0 samples."),
    "top_k": ("Top-k", "Sample from the k likeliest tokens; 0 is off."),
    "top_p": ("Top-p", "Sample from the likeliest tokens with this total probability; 1 is off."),
    "repetition_penalty": ("Repetition penalty", "Above 1 makes earlier tokens less likely; 1 is off."),
    "seed": ("Seed", "The same seed samples the same tokens."),
    "samples": ("Samples at once", "Answers to one prompt, with this seed and the next ones. They share round trips."),
}
PAIRS = [("1", 1), ("3", 3), ("10", 10)]
PAIRS_HELP = "Runs of each arm, in turns. More runs show how far the ratio varies."
# Scrolls to the cards; without animation for visitors who prefer reduced motion.
TO_RESULT = """() => document.getElementById('result').scrollIntoView({block: 'start',
  behavior: matchMedia('(prefers-reduced-motion: reduce)').matches ? 'auto' : 'smooth'})"""
# Does nothing while the button is disabled.
PRESS = "() => document.getElementById('compare').click()"


@dataclass(frozen=True)
class Finished:
    """A comparison with pairs, and what was typed for it."""

    shown: ComparisonView
    typed: dict[str, object]
    words: str


class AnswersTab:
    """The tab's components. `connect` adds their event handlers."""

    def __init__(self, handlers: Handlers) -> None:
        self.handlers = handlers
        self.config = handlers.runs.config
        self.fields: dict[str, Any] = {}
        self.asked = gr.State(None)
        self.finished = gr.State(None)
        self._ask()
        with gr.Row(elem_id="folded"):
            with gr.Accordion("Settings", open=False, elem_id="settings"):
                self._settings()
            with gr.Accordion("Optimization flags", open=False, elem_id="flags"):
                self.picker = Picker(self.config.flags, _probably(self.config.model))
            with gr.Accordion("Network", open=False, elem_id="network"):
                self.network = NetworkPanel(handlers.network)
                self.fields["link"] = self.network.link
        self.result = gr.HTML(view.result(ComparisonView(), ""), elem_id="result")
        with gr.Row(equal_height=True, elem_id="cards"):
            with gr.Column(min_width=320):
                self.full = gr.HTML(view.card(ArmView("full")), elem_id="full")
            with gr.Column(min_width=320):
                self.split = gr.HTML(view.card(ArmView("split")), elem_id="split")
        self.time = gr.HTML("", elem_id="time")
        self.history = HistoryPanel(handlers.historian, handlers.planner)
        self.flag_table = FlagTable(self.handlers, self.compare_flags)
        self.history.lines()

    @property
    def given(self) -> set[Any]:
        """The components that `chosen` reads."""
        return {*self.fields.values(), *self.picker.given, *self.network.given}

    def chosen(self, given: dict[Any, Any]) -> tuple[dict[str, object], str]:
        """The fields by name, and the words of the flags, with all that was pressed. Raises SplitlearnError."""
        typed = {name: given[component] for name, component in self.fields.items()}
        link = network.words(self.network.chosen(given))
        return {**typed, "link": link}, self.picker.chosen(given, self.handlers.runs)

    @property
    def drawn(self) -> list[Any]:
        """The components that show a comparison."""
        return [self.full, self.split, self.result, self.time, self.error, self.status, self.watch]

    def _ask(self) -> None:
        prompt = self.config.generation.prompt
        self.fields["prompt"] = gr.Textbox(
            prompt, label="Prompt", info="Shift+Enter compares.", lines=2, max_lines=8, elem_id="prompt"
        )
        with gr.Row(elem_classes="sl-examples"):
            self.examples = [gr.Button(each.label, size="sm", min_width=80, scale=0) for each in EXAMPLES]
        self.look = gr.HTML(html.small(EXAMPLES[0].look), elem_id="look")
        with gr.Row(elem_id="actions"):
            self.compare = gr.Button("Compare", variant="primary", scale=3, min_width=140, elem_id="compare")
            self.compare_flags = gr.Button("Compare flags", scale=2, min_width=140, elem_id="compare-flags")
            self.stop = gr.Button("Stop", interactive=False, scale=1, min_width=80, elem_id="stop")
            self.fields["pairs"] = gr.Radio(
                PAIRS, value=3, label="Runs of each", info=PAIRS_HELP, scale=2, min_width=240, elem_id="pairs"
            )
        self.status = gr.HTML(html.status(""), elem_id="status")
        self.watch = gr.HTML("", elem_id="watch")
        self.error = gr.HTML("", elem_id="error")

    def _settings(self) -> None:
        generation = self.config.generation
        first = inputs.at_first(generation)
        with gr.Row():
            for name, (label, info) in NUMBERS.items():
                self.fields[name] = gr.Textbox(first[name], label=label, info=info, min_width=240, elem_id=name)
        self.fields["form"] = gr.Radio(
            inputs.forms(_named(generation.chat)),
            value=inputs.form(generation.chat),
            label="Prompt as",
            info="A chat model expects its template.",
        )
        self.fields["ignore_eos"] = gr.Checkbox(
            label="Ignore the end token", info="Always generate up to the limit, for measuring."
        )
        self.fields["stop"] = gr.Textbox(label="Stop strings", info="One per line. The answer ends there.", lines=2)
        self.split_facts = gr.HTML("", elem_id="split-facts")

    def connect(self, tick: Any) -> None:
        """Add the event handlers. `tick` is the timer that runs while this visitor waits for her turn."""
        self.picker.connect(self.handlers.runs)
        self.flag_table.connect(self.fields["prompt"], self.picker)
        self.network.connect(self.history.kept)
        self.tick = tick
        for button, example in zip(self.examples, EXAMPLES, strict=True):
            button.click(None, None, self.fields["prompt"], js=f"() => {json.dumps(example.prompt)}")
            button.click(lambda look=example.look: html.small(look), None, self.look, queue=False)
        self.stop.click(self._stop, None, self.stop, queue=False)
        tick.tick(self._wait, None, [self.status, self.watch, tick], queue=False)
        buttons = [self.compare, self.stop]
        # Show at once that it begins, run in the queue of all runs, and reset the buttons in any case.
        begun = self.compare.click(
            self._begin, self.given, [self.asked, *buttons, *self.drawn, self.history.share, tick], queue=False
        )
        self.fields["prompt"].submit(None, None, None, js=PRESS)
        begun.then(None, None, None, js=TO_RESULT)
        # Each output takes time from the run at every drawing, so what only its end changes has an event of its own.
        ran = begun.then(
            self._compare,
            self.asked,
            [*self.drawn, self.finished, tick],
            concurrency_id="runs",
            concurrency_limit=1,
            trigger_mode="once",
        )
        ran.then(self._end, None, [*buttons, tick], queue=False)
        ran.then(
            self._keep,
            [self.finished, self.history.kept],
            [*self.history.outputs, self.network.costs, self.finished],
        )

    def _stop(self, request: gr.Request) -> Any:
        self.handlers.stops.stop(visitor(request))
        return gr.Button(interactive=False)

    def _begin(self, given: dict[Any, Any], request: gr.Request) -> Updates:
        """Show that it begins, and take the fields as they are now: when the run is asked for, she may type again."""
        place = self.handlers.begin(visitor(request))
        shown = ComparisonView(ArmView("full", "waiting"), ArmView("split", "waiting"))
        return {
            self.asked: given,
            **self._changes(None, shown, ""),
            **self._say(view.status(shown, place, self.handlers.line.runs_request), place),
            self.result: view.result(shown, ""),
            self.time: "",
            **self.history.begin(),
            self.compare: gr.Button(interactive=False),
            self.stop: gr.Button(interactive=True),
            self.tick: gr.Timer(active=place > 0),
        }

    def _end(self, request: gr.Request) -> Updates:
        self.handlers.line.leave(visitor(request))
        buttons = {self.compare: gr.Button(interactive=True), self.stop: gr.Button(interactive=False)}
        return {**buttons, self.tick: gr.Timer(active=False)}

    def _wait(self, request: gr.Request) -> Updates:
        """Show the visitor's place in the queue; if she is not in it, whether others are."""
        who = visitor(request)
        place = self.handlers.line.place(who)
        if place > 0:
            return self._say(view.status(ComparisonView(), place, self.handlers.line.runs_request), place)
        if self.handlers.line.has(who):  # her own run reports its status, or her turn comes next
            return {self.status: gr.skip()}
        return self.open(request)

    def open(self, request: gr.Request) -> Updates:
        """On opening the page: show whether a comparison runs, and poll until none does."""
        who = visitor(request)
        if self.handlers.line.has(who):  # she has already pressed Compare
            return {self.status: gr.skip()}
        others = self.handlers.line.others(who)
        status = view.elsewhere(others, self.handlers.line.runs_request)
        return {**self._say(status, others), self.tick: gr.Timer(active=others > 0)}

    def _say(self, status: str, before: int) -> Updates:
        """The status line; and if others come `before` this visitor, the progress of the one who runs."""
        return {self.status: html.status(status), self.watch: progress(self.handlers.running) if before else ""}

    def _compare(self, given: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """Run the comparison and draw only what changed."""
        before: ComparisonView | None = None
        yield {self.tick: gr.Timer(active=False)}
        try:
            typed, words = self.chosen(given)
        except SplitlearnError as error:
            yield self._changes(None, ComparisonView(error=str(error)), "")
            return
        who = visitor(request)
        with self.handlers.line.turn(who, self.handlers.stops.signal(who)):
            for shown in self.handlers.compare(typed, words, who):
                if changes := self._changes(before, shown, words):  # Gradio rejects an empty update as too few values
                    yield changes
                before = shown
        if before is not None and before.ended and before.pairs is not None:  # once, when no run is timed any more
            yield {self.finished: Finished(before, typed, words)}

    def _keep(self, finished: Finished | None, kept: object, request: gr.Request) -> Updates:
        """Keep the finished comparison, and show it in the history and in the costs of the network."""
        if finished is None:
            return {self.finished: None}
        entries, updates = self.history.finish(finished.shown, finished.typed, finished.words, kept, request)
        costs = self.network.finish(finished.shown, entries, finished.typed["link"], request)
        return {**updates, **costs, self.finished: None}

    def _changes(self, before: ComparisonView | None, shown: ComparisonView, words: str) -> Updates:
        """The updates since `before` (None: all). Drawing less takes less time from a run on the same cores."""
        updates: Updates = {}
        if before is None or view.errors(shown) != view.errors(before):
            updates[self.error] = view.errors(shown)
        if before is None or view.status(shown) != view.status(before):
            updates |= self._say(view.status(shown), 0)
        if before is None or shown.full != before.full or shown.error:
            updates[self.full] = view.card(shown.full)
        if before is None or shown.split != before.split or shown.error:
            updates[self.split] = view.card(shown.split)
        if shown.pairs is not None and (before is None or shown.pairs != before.pairs or shown.ended):
            updates[self.result] = view.result(shown, words)
            if shown.ended:  # once, when no run is timed any more
                updates[self.time] = time.picture(shown.pairs) + view.prompt(shown)
        return updates


def _probably(model: ModelConfig) -> Place:
    """Where the arms probably compute. Only torch knows, and it is not imported here."""
    return Place("cpu" if model.device == "auto" else model.device, dtype=model.dtype)


def _named(chat: bool | str) -> tuple[str, ...]:
    """The configured chat template: the only one known before the model is read."""
    return (DEFAULT, chat) if isinstance(chat, str) else ()
