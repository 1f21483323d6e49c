"""Below the answers: command and files of the comparison, the history, and two of its lines side by side."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from ui import html
from ui.compare.session import ComparisonView
from ui.flags.picker import Updates
from ui.guard.owner import ONLY_OWNER, is_owner
from ui.history import record, view
from ui.history.actions import CSV, JSON, PAGE, TIMES, Finish, Historian
from ui.history.divergence_panel import DivergencePanel
from ui.history.record import Entry
from ui.model.actions import Planner
from ui.visitors import visitor

# Where the browser keeps it. Gradio encrypts it with a key that every page has, so it is no secret.
STORAGE_KEY, SCRAMBLED_WITH = "splitlearn-history", "splitlearn"
REPEAT_HELP = "Runs the same comparison on the command line, in the folder in which the page was started."


class HistoryPanel:
    """The history's components: those of the last comparison, and by `lines` the rest. `connect` adds the handlers."""

    def __init__(self, historian: Historian, planner: Planner) -> None:
        self.historian, self.planner = historian, planner
        self.kept = gr.BrowserState([], storage_key=STORAGE_KEY, secret=SCRAMBLED_WITH)
        with gr.Column(visible=False, elem_id="share") as self.share:
            self.command = gr.Textbox(
                label="The command that repeats this comparison",
                info=REPEAT_HELP,
                lines=2,
                interactive=False,
                buttons=["copy"],
                elem_id="command",
            )
            self.cut = gr.HTML("", elem_id="command-cut")
            with gr.Row():
                self.files = {
                    PAGE: gr.DownloadButton("Share as a file (HTML)", size="sm", min_width=160, elem_id="share-page"),
                    TIMES: gr.DownloadButton(
                        "Time of each token (CSV)", size="sm", min_width=160, elem_id="share-times"
                    ),
                }

    def lines(self) -> None:
        """Build the lower part: all comparisons, and two of them side by side."""
        gr.HTML("<h2>History</h2>", elem_classes="sl-report")
        self.table = gr.HTML(view.history(()), elem_id="history")
        with gr.Column(visible=False, elem_id="history-more") as self.more:
            self._more()
        with gr.Accordion(
            "Earlier comparisons on this machine", open=False, visible=False, elem_id="earlier"
        ) as self.earlier:
            self.records = gr.HTML("", elem_id="earlier-list")

    def _more(self) -> None:
        with gr.Row():
            self.exports = {
                CSV: gr.DownloadButton("History (CSV)", size="sm", min_width=120, elem_id="history-csv"),
                JSON: gr.DownloadButton("History (JSON)", size="sm", min_width=120, elem_id="history-json"),
            }
            self.clear = gr.Button("Clear history", size="sm", min_width=120, elem_id="history-clear")
        with gr.Row():
            self.pins = [
                gr.Dropdown([], value=None, label=label, info=info, min_width=260, elem_id=f"pin-{number}")
                for number, (label, info) in enumerate(
                    (("Pin one", "The line on the left."), ("Pin another", "Ratios are this one / the first.")), 1
                )
            ]
        self.pinned = gr.HTML(view.pinned(None, None), elem_id="pinned")
        self.divergence = DivergencePanel(self.planner)

    @property
    def outputs(self) -> list[Any]:
        """The components that change after a comparison."""
        made = [self.share, self.command, self.cut, *self.files.values()]
        return [*made, self.kept, *self._shown]

    @property
    def _shown(self) -> list[Any]:
        """The components that show the lines."""
        beside = [*self.pins, self.pinned, *self.divergence.drawn]
        return [self.table, self.more, *self.exports.values(), *beside]

    def connect(self, blocks: Any) -> None:
        """Add the event handlers, which show the browser's history when the page opens."""
        blocks.load(self._open, self.kept, [*self._shown, self.earlier], queue=False)
        self.earlier.expand(self._earlier, None, self.records, queue=False)
        self.clear.click(self._clear, None, [self.kept, *self._shown], queue=False)
        gr.on(
            [pin.input for pin in self.pins],
            self._pin,
            [self.kept, *self.pins],
            [self.pinned, *self.divergence.drawn],
            trigger_mode="always_last",
            queue=False,
        )
        self.divergence.connect(self.kept, *self.pins)

    def begin(self) -> Updates:
        """Hide the files of the last comparison when another one begins."""
        return {self.share: gr.Column(visible=False)}

    def finish(
        self, shown: ComparisonView, typed: dict[str, object], words: str, kept: object, request: gr.Request
    ) -> tuple[Sequence[Entry], Updates]:
        """Show and keep a finished comparison. Returns all entries, newest first, and the updates."""
        before = record.read(kept)
        made = self.historian.finish(shown, typed, words, visitor(request), is_owner(request))
        if made is None:
            return before, {}
        entries = record.add(made.entry, before)
        return entries, {**self._made(made), self.kept: record.texts(entries), **self._show(entries, visitor(request))}

    def _made(self, made: Finish) -> Updates:
        files = {button: gr.DownloadButton(value=str(made.files[name])) for name, button in self.files.items()}
        entry = made.entry
        cut = f"The model is {entry.model}, and the trunk has layers {entry.cut}: model.name and split in config.yaml."
        return {self.share: gr.Column(visible=True), self.command: made.command, self.cut: html.small(cut), **files}

    def _open(self, kept: object, request: gr.Request) -> Updates:
        mine = gr.Accordion(visible=is_owner(request))
        return {**self._show(record.read(kept), visitor(request)), self.earlier: mine}

    def _earlier(self, request: gr.Request) -> str:
        """The file's comparisons, for the owner only."""
        if not is_owner(request):
            return html.small(ONLY_OWNER)
        return view.earlier(self.historian.disk.read(), self.historian.keeps(owner=True))

    def _clear(self, request: gr.Request) -> Updates:
        return {self.kept: [], **self._show((), visitor(request))}

    def _show(self, entries: Sequence[Entry], who: str) -> Updates:
        choices = [(entry.label, entry.when.isoformat()) for entry in entries]
        updates: Updates = {self.table: view.history(entries), self.more: gr.Column(visible=bool(entries))}
        updates |= {pin: gr.Dropdown(choices=choices, value=None) for pin in self.pins}
        updates |= {self.pinned: view.pinned(None, None), **self.divergence.show(None, None)}
        if entries:
            files = self.historian.exports(entries, who)
            updates |= {button: gr.DownloadButton(value=str(files[name])) for name, button in self.exports.items()}
        return updates

    def _pin(self, kept: object, first: object, second: object) -> Updates:
        """Show two lines side by side. A name from the browser is only looked up."""
        one, other = record.find(kept, first, second)
        return {self.pinned: view.pinned(one, other), **self.divergence.show(one, other)}
