"""Stop strings: nothing of one is ever shown, and nothing else is lost."""

from hypothesis import given
from hypothesis import strategies as st

from splitlearn.generation.stop_strings import StopStrings

PIECES = st.lists(st.text("ab.", max_size=3), max_size=12)
STOPS = st.lists(st.text("ab.", min_size=1, max_size=3), max_size=3)


@given(PIECES, STOPS)
def test_the_text_ends_right_before_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    stream = StopStrings(stops)
    shown = ""
    for piece in pieces:
        shown += stream.feed(piece)
        if stream.found:
            break
        assert not any(stop in shown for stop in stops)
    whole = "".join(pieces)
    found = [whole.find(stop) for stop in stops if stop in whole]
    if stream.found:
        assert shown == whole[: len(shown)]
        assert any(whole[len(shown) :].startswith(stop) for stop in stops)
    else:
        assert not found
        assert shown + stream.flush("") == whole


def test_a_stop_string_across_pieces_is_found() -> None:
    stream = StopStrings(["\n\n"])
    assert stream.feed("one\n") == "one"
    assert stream.feed("\ntwo") == ""
    assert stream.found
