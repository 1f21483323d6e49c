"""Who may use this trunk, and how much of it: bearer tokens, each with limits of its own.

`Access.caller` says whose a call is, and how many such calls there may be (dispatch.py turns the others away);
`Access.enter` counts a session, and `Guest.spend` its tokens. A session over its rate is slowed down, not refused: it
has a cache here, which a refusal would throw away and a replay compute again. What would have to wait longer than its
client does is refused before it is computed.
"""

import hmac
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import grpc

from server.auth.tokens import Token, digest
from splitlearn.errors import TrunkDenied, TrunkFull
from splitlearn.wire import TOKEN_HEADER, TOKEN_SCHEME

DENIED = "a valid token is needed"
CALLS_BESIDE = 8
"""Calls at once of a token beside its sessions, and of a connection that shows none, where tokens are asked for."""

Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True)
class Caller:
    """Whose a call is: `key` is the same for all calls that share the `limit` of calls at once, None where there is
    none. `known` is false without a valid token, where one is asked for."""

    key: str
    limit: int | None
    known: bool


class Bucket:
    """`rate` tokens a second, of which at most a second's worth is saved up."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._lock = threading.Lock()
        self._saved = rate
        self._at = clock()

    def take(self, tokens: int, within_s: float) -> float:
        """Count `tokens`; returns the seconds until they may be computed. Raises TrunkFull if that is over `within_s`.

        More than is saved up is taken in advance: who comes next waits for it.
        """
        with self._lock:
            now = self._clock()
            self._saved = min(self._rate, self._saved + (now - self._at) * self._rate)
            self._at = now
            wait_s = max(0.0, (tokens - self._saved) / self._rate)
            if wait_s > within_s:
                said = f"{tokens} tokens are over this client's {self._rate:g} a second: {wait_s:.1f} s too early"
                raise TrunkFull(said, wait_s, "token_rate")
            self._saved -= tokens
            return wait_s


class _Account:
    """What the sessions of one token have in common."""

    def __init__(self, token: Token) -> None:
        self.token = token
        self.bucket = Bucket(token.tokens_per_second)
        self._lock = threading.Lock()
        self._sessions = 0

    def enter(self) -> None:
        with self._lock:
            if self._sessions >= self.token.sessions:
                said = f"all {self.token.sessions} sessions of this client are open; try again later"
                raise TrunkFull(said, cause="token_sessions")
            self._sessions += 1

    def leave(self) -> None:
        with self._lock:
            self._sessions -= 1


class Guest:
    """One session of whoever was let in; without an account there are no limits."""

    def __init__(self, account: _Account | None) -> None:
        self._account = account
        self._over = threading.Event()
        self._lock = threading.Lock()

    def spend(self, tokens: int, within_s: float) -> float:
        """Wait until so many tokens may be computed; returns the seconds that it took.

        Raises TrunkFull where that would be longer than `within_s`, TrunkDenied when the token has expired meanwhile.
        """
        if self._account is None:
            return 0.0
        if self._account.token.expired():
            raise TrunkDenied(DENIED)
        wait_s = self._account.bucket.take(tokens, within_s)
        if wait_s:
            self._over.wait(wait_s)
        return wait_s

    def leave(self) -> None:
        """The session is over; a second time does nothing."""
        with self._lock:
            if self._account is not None and not self._over.is_set():
                self._account.leave()
            self._over.set()


class Access:
    """The tokens that are let in. Without any, everybody is."""

    def __init__(self, tokens: Sequence[Token] = ()) -> None:
        self._accounts = [_Account(token) for token in tokens]

    def enter(self, context: grpc.ServicerContext) -> Guest:
        """One session more, until the call ends. Raises TrunkDenied, TrunkFull."""
        account = self._account(context.invocation_metadata() or ())
        if account is not None:
            account.enter()
        guest = Guest(account)
        if not context.add_callback(guest.leave):
            guest.leave()
        return guest

    def caller(self, context: grpc.ServicerContext) -> Caller:
        """Whose the call is."""
        try:
            account = self._account(context.invocation_metadata() or ())
        except TrunkDenied:
            return Caller(f"connection {context.peer()}", CALLS_BESIDE, known=False)
        if account is None:
            return Caller(f"connection {context.peer()}", None, known=True)
        return Caller(f"token {account.token.name}", account.token.sessions + CALLS_BESIDE, known=True)

    def lets_in(self, metadata: Metadata) -> bool:
        """Whether a call with this metadata may be answered."""
        try:
            self._account(metadata)
        except TrunkDenied:
            return False
        return True

    def _account(self, metadata: Metadata) -> _Account | None:
        if not self._accounts:
            return None
        shown = [value for name, value in metadata if name == TOKEN_HEADER]
        value = shown[0] if len(shown) == 1 else ""
        found = None
        if isinstance(value, str) and value[: len(TOKEN_SCHEME)].lower() == TOKEN_SCHEME.lower():
            known = digest(value[len(TOKEN_SCHEME) :])
            for account in self._accounts:  # all of them, so that the time tells nothing
                if hmac.compare_digest(known, account.token.sha256):
                    found = account
        if found is None or found.token.expired():
            raise TrunkDenied(DENIED)
        return found
