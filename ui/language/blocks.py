"""Gradio's Blocks with the page in two languages: the Chinese one is translated where it leaves for the browser."""

from typing import Any

import gradio as gr

from ui.language import translation
from ui.language.choice import CHINESE


class Blocks(gr.Blocks):  # type: ignore[misc]  # Gradio ships no types
    """Blocks with two pages: components made after `begin_chinese` are the Chinese one."""

    def begin_chinese(self) -> None:
        """Begin the Chinese page. Blocks.route() would build Gradio's application again for each page."""
        self.pages.append((CHINESE, CHINESE, False))
        self.current_page = CHINESE

    def get_config_file(self) -> Any:
        """The configuration for the browser, with the Chinese page translated."""
        config = super().get_config_file()
        mine = set(config["page"].get(CHINESE, {}).get("components", ()))
        for component in config["components"]:
            if component["id"] in mine:
                component["props"] = translation.properties(component["type"], component["props"])
        return config

    async def postprocess_data(self, block_fn: Any, predictions: Any, state: Any) -> list[Any]:
        """The changes that an event sends to the page, translated on the Chinese one."""
        changes: list[Any] = await super().postprocess_data(block_fn, predictions, state)
        if block_fn.page != CHINESE:
            return changes
        return [_change(block.get_block_name(), each) for block, each in zip(block_fn.outputs, changes, strict=True)]


def _change(kind: str, change: Any) -> Any:
    if isinstance(change, dict) and change.get("__type__") == "update":
        return translation.properties(kind, change)
    return translation.value(kind, change)
