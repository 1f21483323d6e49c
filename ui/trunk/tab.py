"""The Server tab: the trunk's state, polled once a second while the tab is open, never while a run is timed."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from ui.flags.picker import Updates
from ui.language.translation import translated
from ui.trunk import view
from ui.trunk.monitor import Monitor, ServerView

NAME = "Server"
EVERY_S = 1.0
LOOK_S = 0.25


class ServerTab:
    """The tab's components. `connect` adds their event handlers."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self.timer = gr.Timer(EVERY_S, active=False)
        self.card = gr.HTML(view.cards([ServerView()]), elem_id="server-card")
        gr.HTML(view.meanings())
        self.plots: dict[str, Any] = {}
        titles = list(view.CHARTS)
        for pair in (titles[:2], titles[2:]):
            with gr.Row():
                for title in pair:
                    name = f"server-{title.split()[0].lower()}"
                    self.plots[title] = gr.Plot(
                        show_label=False, container=False, min_width=320, elem_id=name, visible=False
                    )

    def connect(self, tabs: Any) -> None:
        """Run the timer while this tab of `tabs` is selected."""
        tabs.select(self._selected, None, self.timer, queue=False)
        # Async, so that waiting holds no thread; "once", so that no other tick comes meanwhile.
        self.timer.tick(
            self._tick,
            None,
            [self.card, *self.plots.values()],
            concurrency_limit=None,
            trigger_mode="once",
        )

    def _selected(self, chosen: gr.SelectData) -> Any:
        return gr.Timer(active=chosen.value in (NAME, translated(NAME)))  # the label, as this page shows it

    async def _tick(self) -> AsyncIterator[Updates]:
        if self._monitor.measuring():
            yield {self.card: view.cards([], paused=True)}
            while self._monitor.measuring():
                await asyncio.sleep(LOOK_S)
        shown = await asyncio.to_thread(self._monitor.see)
        plots = {plot: gr.Plot(view.picture(shown[0], title), visible=True) for title, plot in self.plots.items()}
        yield {self.card: view.cards(shown), **plots}
