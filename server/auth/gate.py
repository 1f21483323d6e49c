"""Access control: bearer tokens, each with its own limits.

`Access.caller` identifies the client of a call and its limit of concurrent calls, which dispatch.py enforces.
`Access.quota` counts a session, and `Quota.spend` its tokens (splitlearn/access/quota.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from splitlearn.access.quota import Account, Accounts, Quota
from splitlearn.access.tokens import Token
from splitlearn.errors import TrunkDenied
from splitlearn.wire import TOKEN_HEADER

EXTRA_CALLS = 8
"""Concurrent calls that a token may have on top of its sessions. Also the limit of a connection that lacks a token."""


@dataclass(frozen=True)
class Caller:
    """The client of a call. All calls with one `key` share a `limit` of concurrent calls (None: no limit). `known` is
    false if a token is required and the call has no valid one."""

    key: str
    limit: int | None
    known: bool


class Access:
    """Admits clients with a valid token, or every client if no tokens are configured."""

    def __init__(self, tokens: Sequence[Token] = ()) -> None:
        self._accounts = Accounts(tokens)

    def quota(self, context: grpc.ServicerContext) -> Quota:
        """Count one more session until the call ends, and return its quota. Raises TrunkDenied, TrunkFull."""
        account = self._account(context)
        if account is not None:
            account.enter()
        quota = Quota(_key(context, account), account)
        if not context.add_callback(quota.end):
            quota.end()
        return quota

    def caller(self, context: grpc.ServicerContext) -> Caller:
        """The client of a call."""
        try:
            account = self._account(context)
        except TrunkDenied:
            return Caller(_key(context, None), EXTRA_CALLS, known=False)
        limit = None if account is None else account.token.sessions + EXTRA_CALLS
        return Caller(_key(context, account), limit, known=True)

    def _account(self, context: grpc.ServicerContext) -> Account | None:
        metadata = context.invocation_metadata() or ()
        return self._accounts.of([value for name, value in metadata if name == TOKEN_HEADER])


def _key(context: grpc.ServicerContext, account: Account | None) -> str:
    return f"connection {context.peer()}" if account is None else f"token {account.token.name}"
