"""The server's log: one JSON object a line on stderr.

    tell(log, "session closed", session=3, cause="done")

Nothing that comes from a client is written. Of an error only its type and the places in the code are, since its message
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
REFUSED_A_SECOND = 10
"""Lines of refusals in one second: strangers may be refused by the thousand."""


class JsonLines(logging.Formatter):
    """A record as one line: time (UTC), level, event, and what belongs to it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        said: dict[str, object] = {"time": when, "level": record.levelname.lower()}
        error = record.exc_info[1] if record.exc_info else None
        if record.name.partition(".")[0] == OWN:
            said |= {"event": record.msg, **getattr(record, "fields", {})}
        else:
            said |= {"event": "log", "logger": record.name}
            if error is None:
                said["message"] = record.getMessage()
        if error is not None:
            said |= {"error": type(error).__name__, "at": _places(error)}
        return json.dumps(said)


def start(level: int) -> None:
    """Write to stderr: records of this server from `level` on, and warnings of libraries."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger(OWN).setLevel(level)
    logging.captureWarnings(True)


def tell(log: logging.Logger, event: str, **fields: object) -> None:
    """Write `event` with `fields`, none of which may come from a client."""
    log.info(event, extra={"fields": fields})


class _Refusals:
    """Chooses the refusals to write: the first of each second. The next line says how many were left out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._second, self._written, self._left_out = 0, 0, 0

    def fields(self) -> dict[str, object] | None:
        """Fields to add to a line; None for a line that is left out."""
        with self._lock:
            second = int(time.monotonic())
            if second != self._second:
                self._second, self._written = second, 0
            if self._written >= REFUSED_A_SECOND:
                self._left_out += 1
                return None
            self._written += 1
            left_out, self._left_out = self._left_out, 0
            return {"left_out": left_out} if left_out else {}


_refusals = _Refusals()


def refused(log: logging.Logger, **fields: object) -> None:
    """Write that something was refused, at most REFUSED_A_SECOND times a second. Metrics count every one."""
    more = _refusals.fields()
    if more is not None:
        tell(log, "refused", **fields, **more)


def failed(log: logging.Logger, event: str, error: BaseException, **fields: object) -> None:
    """Write that something broke: the type of the first error, and where."""
    first = error.__cause__ or error
    log.error(event, extra={"fields": fields}, exc_info=(type(first), first, first.__traceback__))


def _places(error: BaseException) -> list[str]:
    """File, line and function of each call that led to `error`, the innermost last."""
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
