"""The Server tab: how the trunk is, asked once a second while somebody looks, never while something is timed."""

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
    """Made inside its tab; `connect` makes it live."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self.timer = gr.Timer(EVERY_S, active=False)
        self.card = gr.HTML(view.card(ServerView()), elem_id="server-card")
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
        """The timer runs while this tab of `tabs` is the one that is seen."""
        tabs.select(self._selected, None, self.timer, queue=False, show_progress="hidden")
        # One that waits holds no thread, and no other tick comes meanwhile.
        self.timer.tick(
            self._tick,
            None,
            [self.card, *self.plots.values()],
            show_progress="hidden",
            concurrency_limit=None,
            trigger_mode="once",
        )

    def _selected(self, chosen: gr.SelectData) -> Any:
        return gr.Timer(active=chosen.value in (NAME, translated(NAME)))  # the label, as this page shows it

    async def _tick(self) -> AsyncIterator[Updates]:
        if self._monitor.measuring():
            yield {self.card: view.card(ServerView(), paused=True)}
            while self._monitor.measuring():
                await asyncio.sleep(LOOK_S)
        shown = await asyncio.to_thread(self._monitor.see)
        plots = {plot: gr.Plot(view.picture(shown, title), visible=True) for title, plot in self.plots.items()}
        yield {self.card: view.card(shown), **plots}
