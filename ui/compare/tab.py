"""The Answers tab: one prompt through both arms."""

from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr

from splitlearn.checkpoints.chat_template import DEFAULT
from splitlearn.config import ModelConfig
from splitlearn.flags.registry import Place
from ui import html, inputs
from ui.compare import time, view
from ui.compare.actions import Handlers
from ui.compare.examples import EXAMPLES
from ui.compare.session import ArmView, ComparisonView
from ui.flag_table.panel import FlagTable
from ui.flags.picker import Picker, Updates
from ui.history.panel import HistoryPanel
from ui.network.panel import NetworkPanel
from ui.visitors import visitor

# Text fields, not gr.Number: that hands over an empty value for "x", and nobody could be told what was wrong.
NUMBERS = {
    "max_new_tokens": ("Max new tokens", "The answer ends here at the latest."),
    "temperature": ("Temperature", "0 takes the likeliest token always; above 0 tokens are drawn."),
    "top_k": ("Top-k", "Draw from the k likeliest tokens; 0 is off."),
    "top_p": ("Top-p", "Draw from the likeliest tokens with this share; 1 is off."),
    "repetition_penalty": ("Repetition penalty", "Above 1 makes tokens unlikelier that were there; 1 is off."),
    "seed": ("Seed", "The same seed draws the same tokens."),
    "samples": ("Samples at once", "Answers to one prompt, with this seed and the next ones; they share trips."),
}
PAIRS = [("1", 1), ("3", 3), ("10", 10)]
PAIRS_HELP = "Runs of each arm, in turns. More of them show how far the ratio varies."
# The cards come into view whatever is unfolded, at once for those who want no motion.
TO_RESULT = """() => document.getElementById('result').scrollIntoView({block: 'start',
  behavior: matchMedia('(prefers-reduced-motion: reduce)').matches ? 'auto' : 'smooth'})"""


class AnswersTab:
    """Made inside its tab; `connect` makes it live."""

    def __init__(self, handlers: Handlers) -> None:
        self.handlers = handlers
        self.config = handlers.runs.config
        self.fields: dict[str, Any] = {}
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
        self.history = HistoryPanel(handlers.historian)
        self.flag_table = FlagTable(self.handlers, self.compare_flags)
        self.history.lines()

    @property
    def drawn(self) -> list[Any]:
        """What a comparison is shown in."""
        return [self.full, self.split, self.result, self.time, self.error, self.status]

    def _ask(self) -> None:
        prompt = self.config.generation.prompt
        self.fields["prompt"] = gr.Textbox(
            prompt, label="Prompt", info="Shift+Enter compares.", lines=2, max_lines=8, elem_id="prompt"
        )
        with gr.Row(elem_id="examples"):
            self.examples = [gr.Button(each.label, size="sm", min_width=80, scale=0) for each in EXAMPLES]
        self.look = gr.HTML(html.small(EXAMPLES[0].look), elem_id="look")
        with gr.Row(elem_id="actions"):
            self.compare = gr.Button("Compare", variant="primary", scale=3, min_width=140, elem_id="compare")
            self.compare_flags = gr.Button("Compare flags", scale=2, min_width=140, elem_id="compare-flags")
            self.stop = gr.Button("Stop", interactive=False, scale=1, min_width=80, elem_id="stop")
            self.fields["pairs"] = gr.Radio(
                PAIRS, value=3, label="Runs of each", info=PAIRS_HELP, scale=2, min_width=240, elem_id="pairs"
            )
        self.status = gr.HTML(_status(""), elem_id="status")
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
            label="Ignore the end token", info="Always generate to the limit: for measuring."
        )
        self.fields["stop"] = gr.Textbox(label="Stop strings", info="One on each line; the answer ends there.", lines=2)
        self.split_facts = gr.HTML("", elem_id="split-facts")

    def connect(self, tick: Any) -> None:
        """Make it live. `tick` is the timer that runs while this visitor waits for her turn."""
        self.picker.connect(self.handlers.runs)
        self.flag_table.connect(self.fields["prompt"], self.picker.words)
        self.network.connect(self.history.kept)
        self.tick = tick
        for button, example in zip(self.examples, EXAMPLES, strict=True):
            chosen = {self.fields["prompt"]: example.prompt, self.look: html.small(example.look)}
            button.click(lambda chosen=chosen: chosen, None, list(chosen), queue=False, show_progress="hidden")
        self.stop.click(self._stop, None, self.stop, queue=False, show_progress="hidden")
        tick.tick(self._wait, None, [self.status, tick], show_progress="hidden", queue=False)
        buttons = [self.compare, self.stop]
        # Begin at once, run when no other visitor's run is under way, and set the buttons back whatever happened.
        begun = gr.on(
            [self.compare.click, self.fields["prompt"].submit],
            self._begin,
            None,
            [*buttons, *self.drawn, self.history.share, tick],
            queue=False,
            show_progress="hidden",
        )
        begun.then(None, None, None, js=TO_RESULT)
        ran = begun.then(
            self._compare,
            {*self.fields.values(), self.picker.words, self.history.kept},
            [*self.drawn, *self.history.outputs, self.network.costs, tick],
            concurrency_id="runs",
            concurrency_limit=1,
            show_progress="hidden",
            trigger_mode="once",
        )
        ran.then(self._end, None, [*buttons, tick], queue=False, show_progress="hidden")

    def _stop(self, request: gr.Request) -> Any:
        self.handlers.stops.stop(visitor(request))
        return gr.Button(interactive=False)

    def _begin(self, request: gr.Request) -> Updates:
        place = self.handlers.begin(visitor(request))
        shown = ComparisonView(ArmView("full", "waiting"), ArmView("split", "waiting"))
        return {
            **self._changes(None, shown, "", place),
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
        """The place in the line, while there is one; to one who is not in it, whether others are."""
        who = visitor(request)
        place = self.handlers.line.place(who)
        if place > 0:
            return {self.status: _status(view.status(ComparisonView(), place))}
        if self.handlers.line.has(who):  # hers runs, and says itself how it goes, or another gets the turn before her
            return {self.status: gr.skip()}
        return self.open(request)

    def open(self, request: gr.Request) -> Updates:
        """A page was opened: say whether a comparison runs, and look again until none does."""
        who = visitor(request)
        if self.handlers.line.has(who):  # she was quick, and has pressed Compare
            return {self.status: gr.skip()}
        others = self.handlers.line.others(who)
        return {self.status: _status(view.elsewhere(others)), self.tick: gr.Timer(active=others > 0)}

    def _compare(self, given: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """Draw only what changed."""
        before: ComparisonView | None = None
        words = given[self.picker.words] or ""
        typed = {name: given[component] for name, component in self.fields.items()}
        yield {self.tick: gr.Timer(active=False)}
        with self.handlers.line.turn(visitor(request)):
            for shown in self.handlers.compare(typed, words, visitor(request)):
                if changes := self._changes(before, shown, words):  # Gradio takes an empty one for too few values
                    yield changes
                before = shown
        if before is not None and before.ended and before.pairs is not None:  # once, when nothing is timed any more
            entries, updates = self.history.finish(before, typed, words, given[self.history.kept], request)
            yield {**updates, **self.network.finish(before, entries, typed["link"], request)}

    def _changes(self, before: ComparisonView | None, shown: ComparisonView, words: str, place: int = 0) -> Updates:
        """What to draw anew since `before`; None for everything. Drawing takes time from a run on the same cores."""
        updates: Updates = {}
        if before is None or view.errors(shown) != view.errors(before):
            updates[self.error] = view.errors(shown)
        if before is None or view.status(shown, place) != view.status(before):
            updates[self.status] = _status(view.status(shown, place))
        if before is None or shown.full != before.full or shown.error:
            updates[self.full] = view.card(shown.full)
        if before is None or shown.split != before.split or shown.error:
            updates[self.split] = view.card(shown.split)
        if shown.pairs is not None and (before is None or shown.pairs != before.pairs or shown.ended):
            updates[self.result] = view.result(shown, words)
            if shown.ended:  # once, when nothing is timed any more
                updates[self.time] = time.picture(shown.pairs) + view.prompt(shown)
        return updates


def _status(text: str) -> str:
    """A live region that is there before it speaks."""
    return f'<p class="sl-status" role="status" aria-live="polite">{escape(text)}</p>'


def _probably(model: ModelConfig) -> Place:
    """Where the arms compute, as far as it is known before torch is asked."""
    return Place("cpu" if model.device == "auto" else model.device, dtype=model.dtype)


def _named(chat: bool | str) -> tuple[str, ...]:
    """The chat template that the configuration names: the only one that is known before the model is read."""
    return (DEFAULT, chat) if isinstance(chat, str) else ()
