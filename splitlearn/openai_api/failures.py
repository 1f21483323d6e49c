"""The protocol's error envelope, and which status each of this program's errors has in it."""

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

from splitlearn.errors import InputError, SplitlearnError, TrunkFull, TrunkUnavailable

RETRY_S = 5
MOST_SHOWN = 1000
FIELDS = {"samples": "n", "max_new_tokens": "max_tokens", "chat": "messages"}
"""What the protocol calls a field of this program, where the names differ."""


class ApiError(Exception):
    """A request that gets an error: its status, a sentence, the parameter at fault and the protocol's code."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @classmethod
    def of(cls, error: SplitlearnError) -> "ApiError":
        """What a client is told of `error`."""
        if isinstance(error, InputError):
            param = FIELDS.get(error.field, error.field)
            said = InputError(param, error.value, error.expected)
            return cls(400, str(said), param, "invalid_value")
        if isinstance(error, TrunkFull):
            return cls(429, str(error), code="trunk_full", headers={"Retry-After": str(max(1, round(error.retry_s)))})
        if isinstance(error, TrunkUnavailable):
            return cls(503, str(error), code="trunk_unavailable", headers={"Retry-After": str(RETRY_S)})
        return cls(500, str(error), code="failed")

    def renamed(self, names: Mapping[str, str]) -> "ApiError":
        """The same error on a path that has other `names` for parameters."""
        own = self.param or ""
        if own not in names:
            return self
        return ApiError(self.status, names[own] + str(self).removeprefix(own), names[own], self.code, self.headers)

    def body(self) -> dict[str, Any]:
        """The envelope."""
        kind = "server_error" if self.status >= 500 else _KINDS.get(self.status, "invalid_request_error")
        message, param = _short(str(self)), self.param and _short(self.param)
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The envelope as an answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def _short(text: str) -> str:
    """What a client sent may be long, and hold half of a surrogate pair, which is no UTF-8."""
    shown = text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} ..."
    return shown.encode(errors="backslashreplace").decode()


_KINDS = {401: "authentication_error", 429: "rate_limit_error"}
