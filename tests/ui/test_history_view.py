"""The history and the Network panel without a browser: what is kept, what comes back, what is drawn and exported."""

import csv
import json
from collections.abc import Sequence
from html import escape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitlearn.arms.compare import Pairs
from splitlearn.errors import InputError
from splitlearn.events import GenerationRequest
from splitlearn.link.emulated import Link
from splitlearn.link.prediction import Prediction, predict
from splitlearn.link.words import PRESETS
from splitlearn.models.plan import SplitPlan
from tests.ui.test_ui_view import both, report
from ui.history import record, share, view
from ui.history.record import Entry
from ui.network import view as network
from ui.network.actions import typed_link
from ui.network.view import Forecast

HOSTILE = "<img src=x onerror=alert(1)>"
FORMULA = "=1+1"
NUMBERS = {"rtt_ms": "50", "jitter_ms": "0", "up_mbit": "", "down_mbit": "", "loss_percent": "0"}


def entry(
    prompt: str = "Why?", full: Sequence[int] = (1, 2, 3), split: Sequence[int] = (1, 2, 3), text: str = "123"
) -> Entry:
    pairs = Pairs((report("full", full, text),), (report("split", split, text),))
    request = GenerationRequest(prompt)
    return record.entry(pairs, request, "default", "tiny", SplitPlan(2, 4, 6), "none", f"compare --prompt {prompt}")


def test_what_the_browser_keeps_comes_back_as_it_was() -> None:
    before = record.add(entry("two"), ())
    kept = record.add(entry("one"), before)
    assert record.read(record.texts(kept)) == kept
    assert [each.prompt for each in kept] == ["one", "two"]


@pytest.mark.parametrize("kept", [None, 7, "x", {}, [7], ["x"], ["{}"], ["[" * 9000], ["x" * 100_000], [["a"]]])
def test_what_is_no_entry_is_dropped(kept: object) -> None:
    assert record.read(kept) == ()


@given(
    st.sampled_from(["when", "full", "pairs", "settings", "tpot", "differs_at", "prompt", "request"]),
    st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=50), st.lists(st.none(), max_size=2)),
)
def test_an_entry_with_a_strange_value_is_dropped_or_can_be_drawn_and_exported(name: str, value: object) -> None:
    changed = json.dumps({**entry().model_dump(mode="json"), name: value})
    found = record.read([changed])
    assert len(found) <= 1
    view.history(found)
    view.pinned(*(2 * found or (None, None)))
    share.history_json(found)
    share.history_csv(found)


def test_the_history_is_bounded_in_lines_and_in_size() -> None:
    kept: tuple[Entry, ...] = ()
    for number in range(record.MOST_ENTRIES + 5):
        kept = record.add(entry(f"{number} " + "<&\U0001f600" * 4000, text="\U0001f600<" * 9000), kept)
    texts = record.texts(kept)
    assert 1 < len(texts) <= record.MOST_ENTRIES
    assert sum(map(len, texts)) <= record.MOST_ALL
    assert record.read(texts) == kept
    assert kept[0].prompt.startswith("54 ")


def test_an_answer_is_kept_in_tokens_as_far_as_they_are_whole_characters() -> None:
    assert record.pieces("The sky", ("The", " sky", "")) == ("The", " sky")
    assert record.pieces("ab\u5929\u7a7a", ("ab", "\ufffd", "\ufffd")) == ("ab", "\u5929", "\u7a7a")
    assert len(record.pieces("x" * 9999, ())) == record.MOST_PIECES


def test_the_first_token_that_differs_is_marked_on_both_sides_and_an_earlier_end_is_said() -> None:
    assert view.both(("a", "<b>", "c"), ("a", "d", "c")) == ("a<mark>&lt;b&gt;</mark>c", "a<mark>d</mark>c")
    assert view.both(("a",), ("a", "b")) == ("a<mark>(ended)</mark>", "a<mark>b</mark>")
    assert view.both(("a",), ("a",)) == ("a", "a")


def test_hostile_text_is_shown_as_text_in_the_table_and_side_by_side() -> None:
    one, other = entry(HOSTILE, text=HOSTILE), entry(FORMULA, split=(1, 2, 4))
    for drawn in (view.history([one, other]), view.pinned(one, other)):
        assert "<img" not in drawn
        assert "&lt;img" in drawn
    assert "differ from token 3 on" in view.history([other])
    assert "second / first" in view.pinned(one, other)
    assert "the settings are the same" in view.pinned(one, one)


def test_formulas_are_harmless_in_csv_and_whole_in_json() -> None:
    kept = [entry(FORMULA), entry("+2")]
    rows = list(csv.DictReader(share.history_csv(kept).splitlines()))
    assert [row["prompt"] for row in rows] == ["'=1+1", "'+2"]
    assert [each["prompt"] for each in json.loads(share.history_json(kept))] == ["=1+1", "+2"]


def test_a_shared_page_has_everything_escaped_and_asks_no_network() -> None:
    shown = both((1, 2), (1, 3), HOSTILE)
    assert shown.pairs is not None
    page = share.page(shown, entry(HOSTILE, text=HOSTILE), f"compare --prompt '{HOSTILE}'", {"processor": HOSTILE})
    assert "<img" not in page and "<script" not in page and "http" not in page
    for text in ("The tokens differ from token 2 on", "Where the time goes", "TPS (request)", "processor"):
        assert text in page
    rows = list(csv.DictReader(share.times(shown.pairs).splitlines()))
    assert [(row["arm"], row["token"]) for row in rows] == [
        ("full", "1"),
        ("full", "2"),
        ("split", "1"),
        ("split", "2"),
    ]
    assert float(rows[1]["took_ms"]) == pytest.approx(10)


def test_typed_figures_are_a_link_and_a_wrong_one_is_named_by_its_label() -> None:
    assert typed_link({**NUMBERS, "up_mbit": " 10 "}) == Link(50, up_mbit=10)
    for changed, said in (
        ({"rtt_ms": "x"}, "RTT, ms: 'x' cannot be used; expected a number"),
        ({"jitter_ms": "60"}, "Jitter, ms: 60.0 cannot be used; expected a number from 0 to"),
        ({"up_mbit": "-1"}, "Up, Mbit/s: -1.0 cannot be used"),
    ):
        with pytest.raises(InputError, match=said):
            typed_link(NUMBERS | changed)
    for preset in PRESETS.values():
        assert typed_link(network.fields(preset.link)) == preset.link


def test_every_preset_and_the_typed_link_have_a_prediction_and_what_was_measured_beside_it() -> None:
    split, link = report("split", (1, 2, 3)), Link(50)
    links = [*(preset.link for preset in PRESETS.values()), link]
    measured = {link: Prediction(0.2, 0.0613)}
    forecast = Forecast(Prediction(0.01, 0.01), {each: predict(split.samples, each) for each in links}, measured)
    drawn = network.costs(forecast, link)
    assert drawn.count("<tr>") == 1 + len(links)
    assert "61.3 ms" in drawn
    assert "Over 50 ms, split would take about <b>60.0 ms</b>" in drawn
    assert "Compare once over Loopback" in network.costs(None, link)
    for preset in PRESETS.values():
        assert escape(preset.source) in network.about(preset.link)
