"""Links in words: what is written is read back, and what cannot be meant is named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitlearn.errors import InputError
from splitlearn.link.emulated import Link
from splitlearn.link.words import PRESETS, parse, preset_of

RATES = st.none() | st.floats(0.01, 10_000)


@st.composite
def links(draw: st.DrawFn) -> Link:
    rtt = draw(st.floats(0, 10_000))
    return Link(rtt, draw(st.floats(0, rtt)), draw(RATES), draw(RATES), draw(st.floats(0, 50)))


@given(links())
def test_what_is_written_is_read_back(link: Link) -> None:
    assert parse(str(link)) == link


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_known_by_its_name_and_by_its_words(name: str) -> None:
    link = PRESETS[name].link
    assert parse(name) == parse(name.upper()) == parse(str(link)) == link
    assert preset_of(link) == name


def test_words_change_a_preset_and_have_units() -> None:
    assert parse("wifi, rtt=0.02s") == Link(20, 2, 100, 200)
    assert parse("up=500kbit,down=1gbit") == Link(up_mbit=0.5, down_mbit=1000)
    assert preset_of(parse("wifi,rtt=20ms")) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "a preset"),
        ("wify", "wifi, 4g"),
        ("rtt", "number and a unit"),
        ("rtt=50", "rtt=5ms"),
        ("rtt=fastms", "number and a unit"),
        ("rtt=-1ms", "number and a unit"),
        ("rtt=1e999ms", "rtt_ms"),
        ("up=10ms", "mbit, kbit, gbit"),
        ("up=0mbit", "up_mbit"),
        ("loss=51%", "loss_percent"),
        ("rtt=5ms,jitter=6ms", r"jitter_ms .* rtt_ms \(5\)"),
        ("rtt=5ms,rtt=6ms", "once"),
        ("rtt=5ms,wifi", "a preset"),
        ("rtt=5ms,", "a preset"),
    ],
)
def test_what_cannot_be_meant_is_named_with_what_would_be_right(words: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        parse(words, "trunk.link")
    assert (raised.value.field, raised.value.value) == ("trunk.link", words)


def test_a_link_is_checked_however_it_is_made() -> None:
    for wrong in (Link, lambda rtt_ms: Link(100, rtt_ms), lambda rtt_ms: Link(1, 0, rtt_ms)):
        for value in (float("nan"), float("inf"), -1.0, True, "5"):
            with pytest.raises(InputError):
                wrong(value)  # type: ignore[arg-type]


@given(links(), st.integers(0, 10_000_000))
def test_loss_and_bandwidth_only_ever_add_to_the_delay(link: Link, size: int) -> None:
    for way in (link.up, link.down):
        least = link.rtt_ms / 1e3 / 2 + way.transfer_s(size)
        assert way.expected_s(size) >= least
        if not link.loss_percent:
            assert way.expected_s(size) == least


@given(links(), st.integers(1, 100_000), st.booleans())
def test_the_chances_of_a_loss_are_probabilities(link: Link, size: int, more: bool) -> None:
    timeout, fast = link.up.chances(size, more=more)
    assert min(timeout, fast) >= 0
    assert timeout + fast <= 1 + 1e-9
