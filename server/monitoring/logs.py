"""The server's log: one JSON object a line on stderr.

    info(log, "session closed", session=3, cause="done")

It writes nothing that a client sent. Of an error it writes the type and the places in the code, not the message, which
may quote a client.
"""

import json
import logging
import sys
import threading
import time
import traceback
from pathlib import Path

OWN = "server"
MAX_REFUSALS_PER_S = 10
"""Refusals that are written in one second. Strangers can cause thousands."""


class JsonLines(logging.Formatter):
    """Formats a record as one line: time (UTC), level, event and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without a newline."""
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        line: dict[str, object] = {"time": when, "level": record.levelname.lower()}
        error = record.exc_info[1] if record.exc_info else None
        if record.name.partition(".")[0] == OWN:
            line |= {"event": record.msg, **getattr(record, "fields", {})}
        else:
            line |= {"event": "log", "logger": record.name}
            if error is None:
                line["message"] = record.getMessage()
        if error is not None:
            line |= {"error": type(error).__name__, "at": _frames(error)}
        return json.dumps(line)


def start(level: int) -> None:
    """Log to stderr: this server's records from `level` up, and warnings of libraries."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger(OWN).setLevel(level)
    logging.captureWarnings(True)


def info(log: logging.Logger, event: str, **fields: object) -> None:
    """Write `event` with `fields`, none of which may come from a client."""
    log.info(event, extra={"fields": fields})


class _Refusals:
    """Limits the rate of refusals: the first of each second are written. The next line counts those left out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._second, self._written, self._left_out = 0, 0, 0

    def fields(self) -> dict[str, object] | None:
        """Extra fields of the next line; None if it is left out."""
        with self._lock:
            second = int(time.monotonic())
            if second != self._second:
                self._second, self._written = second, 0
            if self._written >= MAX_REFUSALS_PER_S:
                self._left_out += 1
                return None
            self._written += 1
            left_out, self._left_out = self._left_out, 0
            return {"left_out": left_out} if left_out else {}


_refusals = _Refusals()


def refused(log: logging.Logger, **fields: object) -> None:
    """Log a refusal, at most MAX_REFUSALS_PER_S a second. The metrics count every one."""
    more = _refusals.fields()
    if more is not None:
        info(log, "refused", **fields, **more)


def failed(log: logging.Logger, event: str, error: BaseException, **fields: object) -> None:
    """Log a failure: the type of its first error, and where that was raised."""
    first = error.__cause__ or error
    log.error(event, extra={"fields": fields}, exc_info=(type(first), first, first.__traceback__))


def _frames(error: BaseException) -> list[str]:
    """File, line and function of each call that led to `error`, the innermost last."""
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
