"""The page while its arms are loaded: it answers, and a comparison that is asked for meanwhile is the same one."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from splitlearn import config
from splitlearn.arms.startup import Part, Startup
from splitlearn.events import KINDS
from tests.conftest import TinyFactory
from tests.support.page import running, write_config
from tests.support.trunk import settings
from ui import inputs
from ui.compare import view
from ui.compare.actions import Handlers
from ui.compare.session import ComparisonView

WORDS = "use_cache"


@pytest.fixture
def handlers(tiny_model: TinyFactory) -> Iterator[Handlers]:
    startup = Startup(config.parse({**settings(tiny_model("llama")), "flags": WORDS}))
    try:
        with Handlers(startup) as made:
            yield made
    finally:
        startup.close()


def typed(handlers: Handlers) -> dict[str, object]:
    first = inputs.at_first(handlers.runs.config.generation) | {"max_new_tokens": "6", "link": "none"}
    return {
        **first,
        "prompt": "Why is the sky blue?",
        "pairs": 1,
        "link": "none",
        "form": inputs.RAW,
        "ignore_eos": True,
        "stop": "",
    }


def compare(handlers: Handlers) -> list[ComparisonView]:
    return list(handlers.compare(typed(handlers), WORDS, "visitor"))


def test_a_comparison_asked_for_before_the_arms_are_loaded_starts_by_itself_unless_its_visitor_stops_it(
    handlers: Handlers,
) -> None:
    early, stopped = (handlers.compare(typed(handlers), WORDS, visitor) for visitor in ("visitor", "other"))
    first = next(early)
    assert first.full.state == first.split.state == "warming"
    assert next(stopped).full.state == "warming"
    handlers.stops.stop("other")
    last = list(stopped)[-1]
    assert (last.full.state, last.split.state) == ("stopped", "stopped")
    loaded = list(early)[-1]
    late = compare(handlers)
    assert "warming" not in {shown.full.state for shown in late}
    one, other = loaded.pairs, late[-1].pairs
    assert one is not None and other is not None
    for kind in KINDS:
        assert one.typical(kind).metrics.token_ids == other.typical(kind).metrics.token_ids


def test_wrong_input_is_named_at_once_while_arms_are_loaded(handlers: Handlers) -> None:
    (shown,) = handlers.compare({**typed(handlers), "seed": "x"}, WORDS, "visitor")
    assert "seed" in shown.error
    assert not handlers.startup.running


def test_a_load_that_fails_shows_its_reason_and_the_page_stays(tiny_model: TinyFactory, tmp_path: Path) -> None:
    sections = {"model": {"name": str(tiny_model().folder)}, "generation": {"chat": "nosuch"}}
    with running(write_config(tmp_path, **sections)) as app:
        url = app.url()
        assert httpx.get(url, trust_env=False).status_code == 200
        app.wait_for(re.compile("warning.*nosuch"))
        assert httpx.get(url, trust_env=False).status_code == 200


def test_the_line_about_loading_names_each_part_and_goes_when_all_is_there() -> None:
    parts = {"model": Part("loading", "Fetching (40%)"), "full arm": Part()}
    assert "model loading (Fetching (40%)); full arm waiting" in view.startup(parts, running=True)
    assert view.startup({"model": Part("ready")}, running=False) == ""
    assert "no room" in view.startup({"model": Part("ready"), "full arm": Part("later", "no room")}, running=False)
    failed = view.startup({"model": Part("failed", "<b>wrong</b>.")}, running=False)
    assert 'role="alert"' in failed and "&lt;b&gt;wrong" in failed
