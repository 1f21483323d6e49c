"""Files of tokens, and the rate of one."""

from pathlib import Path

import pytest
import yaml

from splitlearn.access import tokens as token_file
from splitlearn.access.quota import Accounts, Bucket
from splitlearn.errors import InputError, TrunkDenied, TrunkFull
from tests.support.tokens import ANN, BOB, entry


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_lets_through_a_seconds_worth_at_once_and_then_its_rate() -> None:
    clock = Clock()
    bucket = Bucket(10, clock)
    assert [bucket.take(5, 60) for _ in range(4)] == pytest.approx([0, 0, 0.5, 1.0])
    clock.now += 1.0
    assert bucket.take(1, 60) == pytest.approx(0.1)
    clock.now += 1000.0
    assert bucket.take(10, 60) == 0
    assert bucket.take(10, 60) == pytest.approx(1.0), "more than a second's worth was saved up"


def test_a_bucket_refuses_what_would_wait_too_long_and_does_not_count_it() -> None:
    bucket = Bucket(10, Clock())
    with pytest.raises(TrunkFull, match="10 a second"):
        bucket.take(1000, 60)
    assert bucket.take(10, 60) == 0


def test_over_any_time_a_bucket_lets_through_its_rate_and_one_second_more() -> None:
    clock = Clock()
    bucket, begun, let_through = Bucket(50, clock), clock.now, 0
    while clock.now < begun + 20:
        clock.now += bucket.take(7, 60)
        let_through += 7
    assert let_through <= 50 * (clock.now - begun) + 50
    assert let_through >= 50 * 19


def test_what_was_computed_already_is_a_debt_that_time_pays() -> None:
    clock = Clock()
    bucket = Bucket(10, clock)
    bucket.charge(30)
    assert bucket.debt_s() == pytest.approx(2.0)
    clock.now += 1.5
    assert bucket.debt_s() == pytest.approx(0.5)
    clock.now += 60
    assert bucket.debt_s() == 0
    assert bucket.take(10, 60) == 0


def test_a_made_token_is_let_in_and_its_entry_does_not_hold_it(tmp_path: Path) -> None:
    secret, text = token_file.make("Ann Müller: # 'x'")
    assert secret not in text
    path = tmp_path / "tokens.yaml"
    path.write_text(text + token_file.make("another")[1], encoding="utf-8")
    tokens = token_file.load(path, "server.tokens")
    assert [token.name for token in tokens] == ["Ann Müller: # 'x'", "another"]
    accounts = Accounts(tokens)
    found = accounts.of([f"Bearer {secret}"])
    assert found is not None and found.token == tokens[0]
    with pytest.raises(TrunkDenied):
        accounts.of([f"Bearer {secret[:-1]}"])


@pytest.mark.parametrize(
    ("expires", "expired"),
    [("2020-01-01", True), ("2990-01-01", False), ("2020-01-01T00:00:00Z", True), ("2990-01-01T12:00:00+02:00", False)],
)
def test_when_a_token_expires_is_a_date_or_a_time(expires: str, expired: bool, tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text(f"{yaml.safe_dump([entry('ann', ANN)])}  expires: {expires}\n")
    (token,) = token_file.load(path, "server.tokens")
    assert token.expired() is expired


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "YAML list"),
        ("[]", "at least one entry"),
        ("a: [", "YAML list"),
        ("name: ann", "YAML list"),
        (yaml.safe_dump([entry("ann", ANN), entry("ann", BOB)]), "a name of its own"),
        (yaml.safe_dump([entry("ann", ANN), entry("bob", ANN)]), "a sha256 of its own"),
        (yaml.safe_dump([entry("ann", ANN, sha256=ANN)]), r"0\.sha256"),
        (yaml.safe_dump([entry("ann", ANN, sessions=0)]), r"0\.sessions"),
        (yaml.safe_dump([entry("ann", ANN, tokens_per_second=-1.0)]), r"0\.tokens_per_second"),
        (yaml.safe_dump([entry("ann", ANN, secret=ANN)]), r"0\.secret"),
        (yaml.safe_dump([entry("ann", ANN, expires="soon")]), r"0\.expires"),
    ],
)
def test_a_file_of_tokens_that_cannot_be_used_is_named_and_nothing_of_it_is_repeated(
    text: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=f"server.tokens: '{path}'.*{words}") as caught:
        token_file.load(path, "server.tokens")
    assert ANN not in str(caught.value)


def test_a_missing_file_of_tokens_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"server\.tokens.*none\.yaml.*readable"):
        token_file.load(tmp_path / "none.yaml", "server.tokens")
