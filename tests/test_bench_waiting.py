"""The bench's check of places in line, on made-up runs."""

from bench.waiting import Run, check, place_of

FIRST, SECOND = Run(0.0, [], 1.0, 10.0), Run(1.0, [(2.0, 1)], 10.5, 20.0)


def test_a_place_is_read_from_what_the_page_says() -> None:
    assert (
        place_of("Another visitor's comparison is running. You are number 12 in the queue; yours starts by itself.")
        == 12
    )
    assert place_of("A comparison is running. If you press Compare, yours is number 1 in the queue") is None


def test_a_place_is_the_number_of_runs_still_to_come() -> None:
    found = check(Run(2.0, [(3.0, 2), (12.0, 1), (19.0, 1)], 20.5, 30.0), [FIRST, SECOND])
    assert (found.shown, found.exact, found.wrong, found.went_up) == (3, 3, (), False)


def test_a_place_may_be_late_by_a_moment_and_no_more() -> None:
    late = check(Run(2.0, [(11.0, 2)], 20.5, 30.0), [FIRST, SECOND])
    assert (late.exact, late.wrong) == (0, ())
    wrong = check(Run(2.0, [(15.0, 2)], 20.5, 30.0), [FIRST, SECOND])
    assert wrong.wrong == ("number 2, with 1 before it",)


def test_a_place_that_goes_up_is_noticed_and_later_visitors_are_not_before_her() -> None:
    later = Run(2.0, [], 31.0, 40.0)
    found = check(Run(2.0, [(11.5, 1), (12.5, 2)], 20.5, 30.0), [FIRST, SECOND, later])
    assert found.went_up
    assert found.wrong == ("number 2, with 1 before it",)
