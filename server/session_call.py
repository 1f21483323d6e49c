"""A call of Session."""

from collections.abc import Iterator
from dataclasses import dataclass

import grpc

from server.call_log import CallLog
from server.idle_timeout import WatchedCall
from splitlearn.access.quota import Quota
from splitlearn.errors import SplitlearnError
from splitlearn.runtime import private_apis
from splitlearn.wire.status import code_of, shorten


@dataclass
class SessionCall:
    """A call of Session: its context, timeouts, log, quota and messages. `error`: another thread has ended it with
    that."""

    context: grpc.ServicerContext
    watched: WatchedCall
    log: CallLog
    quota: Quota
    requests: Iterator[bytes]
    error: SplitlearnError | None = None

    def fail(self, error: SplitlearnError) -> None:
        """End the call with `error`, from another thread than its own. Does nothing if it has ended."""
        if self.context.is_active():
            self.error = error
            self.log.refused(error)
            private_apis.end_call(self.context, code_of(error), shorten(str(error)))
