"""Takes the pictures of docs/screenshots/ from the running page with the default model: `make screenshots`."""

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from playwright.sync_api import FloatRect, Page, expect

from splitlearn.config import Config
from tests.support import ROOT
from tests.support.page import chromium, conversation, open_page, running, setting, write_config

FOLDER = ROOT / "docs" / "screenshots"
RUN_MS = 1_800_000
SETTLED_MS = 1_500
MARGIN = 16
SIZES = {1280: 900, 390: 844}


def compare(page: Page) -> None:
    """Run a comparison to its end."""
    page.locator("#compare").click()
    expect(page.locator("#time section")).to_be_visible(timeout=RUN_MS)


def flags(page: Page) -> None:
    """Run Compare flags: the first pass, then blocks until the ratios have intervals."""
    page.locator("#compare-flags").click()
    expect(page.locator("#ft-progress")).to_contain_text("block 4", timeout=RUN_MS)
    page.locator("#ft-stop").click()
    expect(page.locator("#compare-flags")).to_be_enabled(timeout=RUN_MS)


def model(page: Page) -> None:
    """Show the model, its cuts and their costs on this machine."""
    page.get_by_role("tab", name="Model and cut").click()
    page.locator("#model-measure").click()
    expect(page.locator("#model-advice")).to_contain_text("Without a limit of memory", timeout=RUN_MS)


def lab(page: Page) -> None:
    """Show the experiment of Compare flags in the Lab."""
    page.get_by_role("tab", name="Lab").click()
    expect(page.locator("#lab-report h2").first).to_be_visible(timeout=RUN_MS)


def chat(page: Page) -> None:
    """Talk with both arms for two turns, and show the token ids of the second one's prompt."""
    page.get_by_role("tab", name="Chat").click()
    conversation(page, "Why is the sky blue?", "And the sea?")


def reads(page: Page) -> None:
    """Read a prompt, and measure the shallow cuts."""
    page.get_by_role("tab", name="What the server reads").click()
    page.locator("#attacks-read").click()
    expect(page.locator("#attacks-readings section")).to_have_count(3, timeout=RUN_MS)
    setting(page, "sweep-cuts", "1,2")
    setting(page, "sweep-limit", "4")
    page.locator("#sweep-start").click()
    expect(page.locator("#sweep-progress")).to_contain_text("Ended", timeout=RUN_MS)


SHOTS: Mapping[str, Callable[[Page], None]] = {
    "compare": compare,
    "flags": flags,
    "lab": lab,
    "model": model,
    "chat": chat,
    "reads": reads,
}


def main() -> int:
    """Take each picture at each size, light and dark. Each shot continues from the page of the last one."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        usual = Config()
        config = write_config(Path(folder), flags=usual.flags, runs={"threads": None})
        with running(config, folder=Path(folder), fresh=True) as app, chromium() as browser:
            page = open_page(browser, app.warm_url())
            for name, act in SHOTS.items():
                act(page)
                _take(page, name)
                if name == "compare":
                    _take_answers(page)
    return 0


def _take(page: Page, name: str) -> None:
    for width, height in SIZES.items():
        page.set_viewport_size({"width": width, "height": height})
        for theme in ("light", "dark"):
            page.evaluate("theme => document.body.classList.toggle('dark', theme === 'dark')", theme)
            page.wait_for_timeout(SETTLED_MS)  # until the charts have settled
            page.screenshot(path=FOLDER / f"{name}-{width}-{theme}.png", full_page=True)


def _take_answers(page: Page) -> None:
    """Take the page down to the two answers, for the README."""
    width, height = next(iter(SIZES.items()))
    page.set_viewport_size({"width": width, "height": height})
    page.evaluate("document.body.classList.remove('dark'); scrollTo(0, 0)")
    page.wait_for_timeout(SETTLED_MS)
    box = page.locator("#cards").bounding_box()
    assert box is not None
    bottom = box["y"] + box["height"] + MARGIN
    clip: FloatRect = {"x": 0, "y": 0, "width": width, "height": bottom}
    page.screenshot(path=FOLDER / "answers.png", full_page=True, clip=clip)


if __name__ == "__main__":
    sys.exit(main())
