"""The limits of a bearer token: sessions at once, and tokens computed a second in all of them together.

A session over its token rate is throttled, not refused: a refusal would discard its KV cache, and a replay would
compute it again. It is refused only if the throttling would exceed its client's timeout.
"""

import hmac
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from splitlearn.access import tokens
from splitlearn.access.tokens import Token, digest
from splitlearn.errors import TrunkDenied, TrunkFull
from splitlearn.wire import TOKEN_SCHEME

DENIED = "a valid token is needed"


class Bucket:
    """A token bucket: refills by `rate` tokens a second and holds at most one second's worth."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._lock = threading.Lock()
        self._saved = rate
        self._at = clock()

    def take(self, tokens: int, within_s: float) -> float:
        """Take `tokens`. Returns the seconds until they may be computed. Raises TrunkFull if that exceeds `within_s`.

        A caller may take more than the bucket holds. The next caller then waits for the difference.
        """
        with self._lock:
            self._refill()
            wait_s = max(0.0, (tokens - self._saved) / self._rate)
            if wait_s > within_s:
                message = f"{tokens} tokens are over this client's {self._rate:g} a second: {wait_s:.1f} s too early"
                raise TrunkFull(message, wait_s, "token_rate")
            self._saved -= tokens
            return wait_s

    def charge(self, tokens: int) -> None:
        """Take `tokens` that were computed already."""
        with self._lock:
            self._refill()
            self._saved -= tokens

    def debt_s(self) -> float:
        """The seconds until all that was taken is paid for."""
        with self._lock:
            self._refill()
            return max(0.0, -self._saved / self._rate)

    def _refill(self) -> None:
        now = self._clock()
        self._saved = min(self._rate, self._saved + (now - self._at) * self._rate)
        self._at = now


class Account:
    """The limits that all sessions of one token share."""

    def __init__(self, token: Token) -> None:
        self.token = token
        self.bucket = Bucket(token.tokens_per_second)
        self._lock = threading.Lock()
        self._sessions = 0

    def enter(self) -> None:
        with self._lock:
            if self._sessions >= self.token.sessions:
                message = f"all {self.token.sessions} sessions of this client are open; try again later"
                raise TrunkFull(message, cause="token_sessions")
            self._sessions += 1

    def leave(self) -> None:
        with self._lock:
            self._sessions -= 1


class Quota:
    """A session's part in its token's limits. Without an account it has no limits. `holder`: the caller's key."""

    def __init__(self, holder: str = "", account: Account | None = None) -> None:
        self.holder = holder
        self._account = account
        self._ended = threading.Event()
        self._lock = threading.Lock()

    def spend(self, tokens: int, within_s: float) -> float:
        """Wait until `tokens` more may be computed. Returns the seconds waited.

        Raises TrunkFull if the wait would exceed `within_s`, TrunkDenied if the token has expired.
        """
        if self._account is None:
            return 0.0
        if self._account.token.expired():
            raise TrunkDenied(DENIED)
        wait_s = self._account.bucket.take(tokens, within_s)
        if wait_s:
            self._ended.wait(wait_s)
        return wait_s

    def charge(self, tokens: int) -> None:
        """Count `tokens` that were computed, for a session that is not throttled itself: see `debt_s`."""
        if self._account is not None:
            self._account.bucket.charge(tokens)

    def debt_s(self) -> float:
        """The seconds until the token's rate allows for all that was computed."""
        return 0.0 if self._account is None else self._account.bucket.debt_s()

    def end(self) -> None:
        """Count the session as ended. Further calls do nothing."""
        with self._lock:
            if self._account is not None and not self._ended.is_set():
                self._account.leave()
            self._ended.set()


class Accounts:
    """The accounts of a file of tokens. It is empty if no tokens are configured: then every client is admitted."""

    def __init__(self, known: Sequence[Token] = ()) -> None:
        self._accounts = [Account(token) for token in known]

    @classmethod
    def read(cls, path: Path | None, setting: str) -> "Accounts":
        """The accounts of the file that `setting` names, if any. Raises InputError if it is unusable."""
        return cls(() if path is None else tokens.load(path, setting))

    def of(self, values: Sequence[str | bytes]) -> Account | None:
        """The account that the values of an authorization header name; None if no tokens are configured.

        Raises TrunkDenied unless there is one value with a valid token.
        """
        if not self._accounts:
            return None
        value = values[0] if len(values) == 1 else ""
        found = None
        if isinstance(value, str) and value[: len(TOKEN_SCHEME)].lower() == TOKEN_SCHEME.lower():
            sha256 = digest(value[len(TOKEN_SCHEME) :])
            for account in self._accounts:  # compare with all, so that the time reveals nothing
                if hmac.compare_digest(sha256, account.token.sha256):
                    found = account
        if found is None or found.token.expired():
            raise TrunkDenied(DENIED)
        return found
