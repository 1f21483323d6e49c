"""What a server knows of how long its layers take."""

from server.step_times import RECENT, StepTimes


def test_nothing_is_known_before_the_first_step() -> None:
    assert (StepTimes().decode_s, StepTimes().prefill_s) == (0.0, 0.0)


def test_the_quickest_forward_of_one_step_counts_and_shared_ones_do_not() -> None:
    times = StepTimes()
    for steps, tokens, seconds in ((1, 1, 0.03), (1, 1, 0.02), (4, 4, 0.01), (1, 101, 0.22), (1, 101, 0.3), (2, 50, 0)):
        times.note(steps, tokens, seconds)
    assert times.decode_s == 0.02
    assert abs(times.prefill_s - 0.002) < 1e-12


def test_what_is_long_ago_is_forgotten() -> None:
    times = StepTimes()
    for seconds in (0.01, *[0.02] * RECENT):
        times.note(1, 1, seconds)
    assert times.decode_s == 0.02
