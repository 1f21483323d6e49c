"""Below the answers: the comparison's command and files, the history, and two of its lines side by side."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from ui import html
from ui.compare.session import ComparisonView
from ui.flags.picker import Updates
from ui.guard.owner import ONLY_OWNER, is_owner
from ui.history import record, view
from ui.history.actions import CSV, JSON, PAGE, TIMES, Finish, Historian
from ui.history.record import Entry
from ui.visitors import visitor

# Where the browser keeps it. Gradio scrambles it with a word that every page of the program has: no secret.
STORAGE_KEY, SCRAMBLED_WITH = "splitlearn-history", "splitlearn"
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
REPEAT_HELP = "The same on the command line, where this program is installed."


class HistoryPanel:
    """Made inside a tab: what belongs to the last comparison at once, the rest by `lines`. `connect` makes it live."""

    def __init__(self, historian: Historian) -> None:
        self.historian = historian
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
        """Make what stands further down: all comparisons, and two of them side by side."""
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

    @property
    def outputs(self) -> list[Any]:
        """What a comparison that has ended is shown in."""
        made = [self.share, self.command, self.cut, *self.files.values()]
        return [*made, self.kept, self.table, self.more, *self.exports.values(), *self.pins, self.pinned]

    def connect(self, blocks: Any) -> None:
        """Make it live: what the browser has kept is shown when the page opens."""
        shown = [self.table, self.more, *self.exports.values(), *self.pins, self.pinned]
        blocks.load(self._open, self.kept, [*shown, self.earlier], **AT_ONCE)
        self.earlier.expand(self._earlier, None, self.records, **AT_ONCE)
        self.clear.click(self._clear, None, [self.kept, *shown], **AT_ONCE)
        for pin in self.pins:
            pin.input(self._pin, [self.kept, *self.pins], self.pinned, **AT_ONCE)

    def begin(self) -> Updates:
        """Another comparison begins: the files of the last one are not its files."""
        return {self.share: gr.Column(visible=False)}

    def finish(
        self, shown: ComparisonView, typed: dict[str, object], words: str, kept: object, request: gr.Request
    ) -> tuple[Sequence[Entry], Updates]:
        """Show and keep the comparison that has ended. Gives all entries, newest first."""
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
        """What the file holds, for the owner alone."""
        if not is_owner(request):
            return html.small(ONLY_OWNER)
        return view.earlier(self.historian.disk.read(), self.historian.keeps(owner=True))

    def _clear(self, request: gr.Request) -> Updates:
        return {self.kept: [], **self._show((), visitor(request))}

    def _show(self, entries: Sequence[Entry], who: str) -> Updates:
        choices = [(entry.label, entry.when.isoformat()) for entry in entries]
        updates: Updates = {self.table: view.history(entries), self.more: gr.Column(visible=bool(entries))}
        updates |= {pin: gr.Dropdown(choices=choices, value=None) for pin in self.pins}
        updates[self.pinned] = view.pinned(None, None)
        if entries:
            files = self.historian.exports(entries, who)
            updates |= {button: gr.DownloadButton(value=str(files[name])) for name, button in self.exports.items()}
        return updates

    def _pin(self, kept: object, one: object, other: object) -> str:
        """Only lines that there are: a name from the browser is looked up, no more."""
        found = {entry.when.isoformat(): entry for entry in record.read(kept)}
        return view.pinned(*(found.get(name) if isinstance(name, str) else None for name in (one, other)))
