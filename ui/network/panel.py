"""The panel "Network": choose the link between client and trunk, see its cost, measure the real one."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr

from splitlearn.errors import SplitlearnError
from splitlearn.link import words
from splitlearn.link.emulated import NONE, Link
from splitlearn.link.words import PRESETS
from ui import html, inputs
from ui.compare.session import ComparisonView
from ui.flags.picker import Updates
from ui.history import record
from ui.history.record import Entry
from ui.network import view
from ui.network.actions import NUMBERS, Network, typed_link
from ui.visitors import visitor

LINK_HELP = "Delays the bytes between client and trunk for real. Choose one, or type words: rtt=50ms,up=10mbit."
WHAT = "What if your server is far away? Choose a link, or type yours: RTT 50 for a server 50 ms away."


class NetworkPanel:
    """The panel's components. `connect` adds their event handlers. `link` holds the words of the chosen link."""

    def __init__(self, network: Network) -> None:
        self.network = network
        first = network.runs.config.trunk.link or NONE
        gr.HTML(html.small(WHAT))
        self.link = gr.Dropdown(
            [(preset.label, name) for name, preset in PRESETS.items()],
            value=first,
            allow_custom_value=True,
            label="Link to the trunk",
            info=LINK_HELP,
            min_width=240,
            elem_id="link",
        )
        self.about = gr.HTML(view.about(words.parse(first)), elem_id="link-about")
        values = view.fields(words.parse(first))
        with gr.Row():
            self.numbers = {
                name: gr.Textbox(values[name], label=label, info=info, min_width=130, elem_id=f"link-{name}")
                for name, (label, info) in NUMBERS.items()
            }
        # JSON of the texts that the number fields were last set to: what differs was typed since. It is in the page, so
        # that it changes together with them.
        self.drawn = gr.Textbox(json.dumps(values), visible="hidden")
        self.error = gr.HTML("", elem_id="link-error")
        with gr.Row():
            self.measure = gr.Button("Measure the real link", size="sm", min_width=180, scale=0, elem_id="link-measure")
            self.real = gr.HTML(_status(""), elem_id="link-real")
        self.costs = gr.HTML(view.costs(None, Link()), elem_id="link-costs")

    def connect(self, kept: Any) -> None:
        """Add the event handlers. `kept` is the history, which has the measurements."""
        self.kept = kept
        # A preset's figures are filled in without asking the server: an answer would overwrite what is typed meanwhile.
        filled = {name: view.fields(preset.link) for name, preset in PRESETS.items()}
        table = {name: [json.dumps(texts), *texts.values()] for name, texts in filled.items()}
        shown = [self.drawn, *self.numbers.values()]
        self.link.input(
            None, [self.link, *shown], shown, js=f"(link, ...shown) => ({json.dumps(table)})[link] ?? shown"
        )
        # One event for all. Of two answers, the first would overwrite what the second was asked about.
        ways = [way for each in self.numbers.values() for way in (each.input, each.submit, each.blur)]
        gr.on(
            [self.link.input, *ways],
            self._change,
            {*self.given, kept},
            [*self.given, self.about, self.costs, self.error],
            trigger_mode="always_last",
            queue=False,
        )
        begun = self.measure.click(self._wait, None, self.real, queue=False)
        # In the queue of all runs: at once, the two would disturb each other.
        begun.then(
            self._measure,
            None,
            self.real,
            concurrency_id="runs",
            concurrency_limit=1,
        )

    @property
    def given(self) -> set[Any]:
        """The components that `chosen` reads."""
        return {self.link, *self.numbers.values(), self.drawn}

    def chosen(self, given: Mapping[Any, Any]) -> Link:
        """The chosen link, with the figures that were typed since it was drawn. Raises InputError."""
        link, typed = words.parse(str(given[self.link] or NONE)), self._typed(given)
        return typed_link(view.fields(link) | typed) if typed else link

    def finish(self, shown: ComparisonView, entries: Sequence[Entry], chosen: object, request: gr.Request) -> Updates:
        """Redraw the costs after a comparison, which is the first of `entries`."""
        if shown.pairs is None or not entries:
            return {}
        self.network.keep(shown, entries[0], visitor(request))
        return {self.costs: self._costs(words.parse(str(chosen or NONE)), entries, request)}

    def anew(self, chosen: object, kept: object, request: gr.Request) -> Updates:
        """Redraw the costs for another model or cut."""
        try:
            link = words.parse(str(chosen or NONE))
        except SplitlearnError:  # still being typed
            link = Link()
        return {self.costs: self._costs(link, record.read(kept), request)}

    def _typed(self, given: Mapping[Any, Any]) -> dict[str, Any]:
        """The texts of the number fields in which something was typed since they were drawn."""
        was = inputs.drawn(given[self.drawn])
        return {name: given[box] for name, box in self.numbers.items() if given[box] != was.get(name, given[box])}

    def _change(self, given: Mapping[Any, Any], request: gr.Request) -> Updates:
        """Show the link of what was chosen and typed. What is right already is left alone: she may be typing in it."""
        try:
            link = self.chosen(given)
        except SplitlearnError as error:
            return {self.error: html.error(str(error))}
        values = view.fields(link) | self._typed(given)
        updates = {box: values[name] for name, box in self.numbers.items() if given[box] != values[name]}
        if self._typed(given):
            updates[self.link] = view.words(link)
        about = self._about(link, record.read(given[self.kept]), request)
        return {**updates, **about, self.drawn: json.dumps(values)}

    def _about(self, link: Link, entries: Sequence[Entry], request: gr.Request) -> Updates:
        return {self.about: view.about(link), self.error: "", self.costs: self._costs(link, entries, request)}

    def _costs(self, link: Link, entries: Sequence[Entry], request: gr.Request) -> str:
        return view.costs(self.network.forecast(link, entries, visitor(request)), link)

    def _wait(self) -> str:
        return _status("Measuring. If a comparison is running, this waits for it.")

    def _measure(self) -> str:
        try:
            return _status(f"The real link: {self.network.real().summary}. An emulated link comes on top of it.")
        except SplitlearnError as error:
            return html.error(str(error))


def _status(text: str) -> str:
    """A live region. It is there before it has text, so that screen readers announce its changes."""
    return f'<p class="sl-status" role="status" aria-live="polite">{escape(text)}</p>'
