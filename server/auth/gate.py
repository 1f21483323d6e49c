"""Access control: bearer tokens, each with limits of its own.

`Access.caller` says whose call it is, and how many calls that client may have at once (dispatch.py refuses the others).
`Access.quota` counts a session, and `Quota.spend` its tokens. A session over its rate is throttled, not refused: a
refusal would throw its KV cache away, and a replay compute it again. A step that would have to wait for longer than its
client waits is refused before it is computed.
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
"""How many calls at once a token may have beside its sessions, and a connection without the token that it needs."""

Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True)
class Caller:
    """The client of a call. All calls of one `key` share a `limit` of calls at once (None: no limit). `known` is false
    where a token is required and the call has no valid one."""

    key: str
    limit: int | None
    known: bool


class Bucket:
    """A token bucket: `rate` tokens a second, at most one second's worth saved up."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._lock = threading.Lock()
        self._saved = rate
        self._at = clock()

    def take(self, tokens: int, within_s: float) -> float:
        """Count `tokens`; returns the seconds until they may be computed. Raises TrunkFull if that is over `within_s`.

        More than is saved up is taken in advance: the next caller waits for it.
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
    """The limits that all sessions of one token share."""

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


class Quota:
    """One session's share of its token's limits; no limits without an account. `holder` is the caller's key."""

    def __init__(self, holder: str = "", account: _Account | None = None) -> None:
        self.holder = holder
        self._account = account
        self._ended = threading.Event()
        self._lock = threading.Lock()

    def spend(self, tokens: int, within_s: float) -> float:
        """Wait until so many tokens may be computed; returns the seconds that it took.

        Raises TrunkFull where that would take longer than `within_s`, TrunkDenied when the token has expired.
        """
        if self._account is None:
            return 0.0
        if self._account.token.expired():
            raise TrunkDenied(DENIED)
        wait_s = self._account.bucket.take(tokens, within_s)
        if wait_s:
            self._ended.wait(wait_s)
        return wait_s

    def end(self) -> None:
        """The session is over. Ending it again does nothing."""
        with self._lock:
            if self._account is not None and not self._ended.is_set():
                self._account.leave()
            self._ended.set()


class Access:
    """Lets clients in that have a valid token; all clients if there are no tokens."""

    def __init__(self, tokens: Sequence[Token] = ()) -> None:
        self._accounts = [_Account(token) for token in tokens]

    def quota(self, context: grpc.ServicerContext) -> Quota:
        """The quota of one more session, until the call ends. Raises TrunkDenied, TrunkFull."""
        account = self._account(context.invocation_metadata() or ())
        if account is not None:
            account.enter()
        quota = Quota(_key(context, account), account)
        if not context.add_callback(quota.end):
            quota.end()
        return quota

    def caller(self, context: grpc.ServicerContext) -> Caller:
        """The client of a call."""
        try:
            account = self._account(context.invocation_metadata() or ())
        except TrunkDenied:
            return Caller(_key(context, None), CALLS_BESIDE, known=False)
        limit = None if account is None else account.token.sessions + CALLS_BESIDE
        return Caller(_key(context, account), limit, known=True)

    def _account(self, metadata: Metadata) -> _Account | None:
        if not self._accounts:
            return None
        shown = [value for name, value in metadata if name == TOKEN_HEADER]
        value = shown[0] if len(shown) == 1 else ""
        found = None
        if isinstance(value, str) and value[: len(TOKEN_SCHEME)].lower() == TOKEN_SCHEME.lower():
            known = digest(value[len(TOKEN_SCHEME) :])
            for account in self._accounts:  # all of them, so that the time reveals nothing
                if hmac.compare_digest(known, account.token.sha256):
                    found = account
        if found is None or found.token.expired():
            raise TrunkDenied(DENIED)
        return found


def _key(context: grpc.ServicerContext, account: _Account | None) -> str:
    return f"connection {context.peer()}" if account is None else f"token {account.token.name}"
