"""The Server tab in a real browser."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, expect

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.probe import Snapshot
from splitlearn.wire import trunk_pb2 as pb
from tests.conftest import TinyFactory
from tests.support.page import CHROMIUM, open_page, running, write_config
from tests.support.trunk import PLAN, Raw, Trunk, opening, serve, settings
from ui.trunk.monitor import Figures, Series, ServerView, between
from ui.trunk.view import card, picture

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM} (Debian's package of that name)"),
]
LAYERS = {"start": PLAN.start, "end": PLAN.end}


@pytest.fixture
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model()


@pytest.fixture
def trunk(files: ModelFiles, tmp_path: Path) -> Iterator[Trunk]:
    with serve(settings(files, split=LAYERS), tmp_path) as started:
        yield started


def test_the_tab_shows_sessions_come_and_go_and_a_trunk_that_does_not_answer(
    trunk: Trunk, files: ModelFiles, browser: BrowserContext, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = write_config(tmp_path_factory.mktemp("app"), model={"name": str(files.folder)}, split=LAYERS)
    with running(config, "--trunk", trunk.address) as app:
        page = open_page(browser, app.warm_url())
        page.get_by_role("tab", name="Server", exact=True).click()
        card = page.locator("#server-card")
        sessions = card.locator("dl div").filter(has=page.get_by_text("Sessions", exact=True)).locator("dd")
        expect(sessions).to_have_text("0 / 64")
        expect(card).to_contain_text(trunk.address)
        with Raw(trunk.address) as raw:
            raw.ask(opening(files, flags=["use_cache", "prefix_cache"], prefix_keys=bytes(32)))
            expect(sessions).to_have_text("1 / 64")
            expect(card.locator("dl div").filter(has_text="Prefix hits").locator("dd")).to_have_text("0 / 32")
            expect(card.locator("dl div").filter(has_text="Prefixes kept").locator("dd")).to_have_text("0 B / 268 MB")
            expect(page.locator("#server-sessions .js-plotly-plot")).to_be_visible()
            for width, height in ((1280, 800), (390, 844)):
                page.set_viewport_size({"width": width, "height": height})
                assert page.evaluate("document.documentElement.scrollWidth") <= width
        expect(sessions).to_have_text("0 / 64")
        trunk.process.terminate()
        expect(card.locator(".sl-error")).to_contain_text(f"{trunk.address} does not answer")


def test_what_happened_in_a_pause_is_said_to_be_of_all_of_it_and_no_line_crosses_it() -> None:
    decoded: Series = ("tokens_total", (("kind", "decode"),))
    seen = [Figures(0.0, {}, {}), Figures(1.0, {}, {}), between(1.0, {decoded: 0.0}, 101.0, {decoded: 400.0})]
    snapshot = Snapshot("a:1", 101.0, True, pb.Description(), "")
    drawn = ServerView(snapshot, tuple(seen))
    assert "4.0 /s" in card(drawn)
    assert "of the last 100 s." in card(drawn)
    (line,) = (line for line in picture(drawn, "Tokens per second").data if line.name == "decode")
    assert line.x == (-101.0, -100.0, None, 0.0)
    assert line.y == (None, None, None, 4.0)
