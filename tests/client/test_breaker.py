"""The circuit breaker against its rule, in any order of tries, failures, successes and waits."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from splitlearn.client.circuit_breaker import COOL_DOWN_S, FAILURES, LONGEST_S, Breaker


class BreakerMachine(RuleBasedStateMachine):
    """A client that tries only when it may, on a clock that the test turns."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.breaker = Breaker(lambda: self.now)
        self.in_a_row, self.closed_until, self.cool_down_s = 0, 0.0, COOL_DOWN_S

    @rule(seconds=st.floats(0, 2 * LONGEST_S))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def fail(self) -> None:
        if self.breaker.rest_s():
            return
        self.breaker.trying()
        self.breaker.failed()
        self.in_a_row += 1
        if self.in_a_row >= FAILURES:
            self.closed_until = self.now + self.cool_down_s
            self.cool_down_s = min(2 * self.cool_down_s, LONGEST_S)

    @rule()
    def succeed(self) -> None:
        if self.breaker.rest_s():
            return
        self.breaker.trying()
        self.breaker.succeeded()
        self.in_a_row, self.closed_until, self.cool_down_s = 0, 0.0, COOL_DOWN_S

    @rule()
    def begin_a_probe(self) -> None:
        """While a probe is out, the others wait."""
        if self.breaker.rest_s() or self.in_a_row < FAILURES:
            return
        self.breaker.trying()
        self.closed_until = self.now + self.cool_down_s

    @invariant()
    def it_rests_as_long_as_the_rule_says(self) -> None:
        assert self.breaker.rest_s() == pytest.approx(max(0.0, self.closed_until - self.now))
        assert self.breaker.rest_s() <= LONGEST_S + 1e-9

    @invariant()
    def few_failures_close_nothing(self) -> None:
        assert self.breaker.failures == self.in_a_row
        if self.in_a_row < FAILURES:
            assert self.breaker.rest_s() == 0


TestBreaker = BreakerMachine.TestCase
