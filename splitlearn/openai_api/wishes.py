"""How a request is to be queued, by headers of its own: `x-priority` and `x-deadline-s`."""

import math
from dataclasses import dataclass

from starlette.datastructures import Headers

from splitlearn.openai_api.failures import ApiError
from splitlearn.openai_api.queue import PRIORITIES, Priority

PRIORITY, DEADLINE = "x-priority", "x-deadline-s"


@dataclass(frozen=True)
class Wishes:
    """A request's priority, and the seconds that its answer may take in all, None for any time."""

    priority: Priority
    deadline_s: float | None

    @classmethod
    def of(cls, headers: Headers) -> "Wishes":
        """What the headers say. Raises ApiError."""
        named = headers.get(PRIORITY, "interactive")
        priority = next((each for each in PRIORITIES if each == named), None)
        if priority is None:
            raise _wrong(PRIORITY, named, " or ".join(PRIORITIES))
        return cls(priority, _seconds(headers.get(DEADLINE)))


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise _wrong(DEADLINE, text, "a number of seconds above 0")
    return seconds


def _wrong(header: str, value: str, expected: str) -> ApiError:
    return ApiError(400, f"{header}: {value!r} cannot be used; expected {expected}.", header, "invalid_value")
