"""The panel "Network": choose the link between client and trunk, see its cost, measure the real one."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr

from splitlearn.errors import SplitlearnError
from splitlearn.link import words
from splitlearn.link.emulated import NONE, Link
from splitlearn.link.words import PRESETS
from ui import html
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
        self.error = gr.HTML("", elem_id="link-error")
        with gr.Row():
            self.measure = gr.Button("Measure the real link", size="sm", min_width=180, scale=0, elem_id="link-measure")
            self.real = gr.HTML(_status(""), elem_id="link-real")
        self.costs = gr.HTML(view.costs(None, Link()), elem_id="link-costs")

    def connect(self, kept: Any) -> None:
        """Add the event handlers. `kept` is the history, which has the measurements."""
        self.kept = kept
        drawn = [self.about, self.costs, self.error]
        latest = {"trigger_mode": "always_last", "queue": False}
        self.link.input(self._chosen, [self.link, kept], [*self.numbers.values(), *drawn], **latest)
        given = {*self.numbers.values(), kept}
        ways = [way for each in self.numbers.values() for way in (each.input, each.submit, each.blur)]
        gr.on(ways, self._typed, given, [self.link, *drawn], **latest)
        begun = self.measure.click(self._wait, None, self.real, queue=False)
        # In the queue of all runs: at once, the two would disturb each other.
        begun.then(
            self._measure,
            None,
            self.real,
            concurrency_id="runs",
            concurrency_limit=1,
        )

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

    def _chosen(self, chosen: object, kept: object, request: gr.Request) -> Updates:
        try:
            link = words.parse(str(chosen or NONE))
        except SplitlearnError as error:
            return {self.error: html.error(str(error))}
        values = view.fields(link)
        return {
            **{box: values[name] for name, box in self.numbers.items()},
            **self._about(link, record.read(kept), request),
        }

    def _typed(self, given: Mapping[Any, Any], request: gr.Request) -> Updates:
        try:
            link = typed_link({name: given[box] for name, box in self.numbers.items()})
        except SplitlearnError as error:
            return {self.error: html.error(str(error))}
        return {self.link: view.words(link), **self._about(link, record.read(given[self.kept]), request)}

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
