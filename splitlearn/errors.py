"""Every exception that splitlearn raises on purpose.

    SplitlearnError
    |-- InputError          a value from a person or a peer; names the field, the value and what would be right
    |-- ModelError          weights or architecture
    |   |-- ModelUnavailable   not in the cache, and cannot be fetched from here
    |   |-- WeightsDamaged     a cached file is not what was written
    |   |-- FamilyRefused      the architecture cannot be cut exactly
    |   `-- NotFinite          a result is NaN or beyond what the dtype holds
    |-- TrunkError          the far end of a split
    |   |-- TrunkUnavailable   no answer, or the connection was lost
    |   |   |-- TrunkLate          the answer would come too late: the step was dropped
    |   |   `-- TrunkForgot        the session to fork is not there (any more)
    |   |-- TrunkRefused       the trunk serves something else, or refused a message
    |   |   `-- TrunkDenied       it requires a valid token
    |   |-- TrunkFull          no room for a session now
    |   `-- TrunkFailed        the trunk broke while computing
    |-- EndpointError       a server of the OpenAI protocol that is measured did not answer as the protocol says
    |   `-- EndpointFull       it has no room for a request now
    |-- StepUnwanted        the step was dropped: its caller does not want it any more
    |-- WorkFailed          a worker process met an unexpected error, and goes on
    |-- WorkerDied          a worker process ended without a message (killed, out of memory)
    `-- SetupError          the program cannot start here as asked (a port is taken, no login for a shared page)

Each message is one or two sentences for the user, who needs no traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class SplitlearnError(Exception):
    """The root: catch this to catch all of them."""


class InputError(SplitlearnError):
    """A value that cannot be used. `field` is its name for people: a config key, an option, a wire field."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        end = "" if expected.endswith("?") else "."
        super().__init__(f"{field}: {value!r} cannot be used; expected {expected}{end}")
        self.field = field
        self.value = value
        self.expected = expected

    def __reduce__(self) -> tuple[type["InputError"], tuple[str, object, str]]:
        """Pickle the three parts; a value of no plain type becomes text."""
        plain = isinstance(self.value, str | int | float | None)
        return type(self), (self.field, self.value if plain else repr(self.value), self.expected)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, to end what an InputError expects: X is the name in `known` that `word` resembles most,
    whatever its case. Empty if it resembles none."""
    names = {name.casefold(): name for name in known}
    # difflib's usual cutoff of 0.6 takes "nonsense" for "none".
    near = get_close_matches(word.casefold(), names, n=1, cutoff=0.7)
    return f"; did you mean {names[near[0]]}?" if near else ""


class StepUnwanted(SplitlearnError):
    """The step was dropped: its caller does not want it any more."""


class ModelError(SplitlearnError):
    """Weights or architecture: the model cannot be used as it is."""


class ModelUnavailable(ModelError):
    """The weights are not in the cache and cannot be fetched from here."""


class WeightsDamaged(ModelError):
    """A file in the cache is not what was written there."""


class FamilyRefused(ModelError):
    """The architecture cannot be cut into stages that give the full model's logits."""


class NotFinite(ModelError):
    """The model computed NaN or Inf. Names the layer where that began."""


class TrunkError(SplitlearnError):
    """The trunk server did not do what it was asked. `cause` is the server's metric label of the reason."""

    def __init__(self, message: str, cause: str = "") -> None:
        super().__init__(message)
        self.cause = cause


class TrunkUnavailable(TrunkError):
    """There is no answer at the address, or the connection was lost."""


class TrunkLate(TrunkUnavailable):
    """The trunk dropped a step that waited longer than its client's timeout."""


class TrunkForgot(TrunkUnavailable):
    """The trunk does not have, or not any more, the session that another one was to fork."""


class TrunkRefused(TrunkError):
    """The trunk serves something else, or refused a message."""


class TrunkDenied(TrunkRefused):
    """The trunk requires a valid token."""


class TrunkFull(TrunkError):
    """The trunk has no room for another session now. `retry_s`: seconds after which to try again."""

    def __init__(self, message: str, retry_s: float = 1.0, cause: str = "") -> None:
        super().__init__(message, cause)
        self.retry_s = retry_s


class TrunkFailed(TrunkError):
    """The trunk failed while computing."""


class EndpointError(SplitlearnError):
    """A server of the OpenAI protocol that is measured did not answer as the protocol says."""


class EndpointFull(EndpointError):
    """The server has no room for another request now. `retry_s`: seconds after which to try again."""

    def __init__(self, message: str, retry_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class WorkFailed(SplitlearnError):
    """A worker process met an unexpected error while it loaded or computed. The process goes on."""


class WorkerDied(SplitlearnError):
    """A worker process ended without a message: killed, or out of memory."""


class SetupError(SplitlearnError):
    """The program cannot start with these settings on this machine."""


def as_error(error: Exception, doing: str) -> SplitlearnError:
    """`error` if it is a SplitlearnError, else a WorkFailed with its type and first line."""
    if isinstance(error, SplitlearnError):
        return error
    lines = str(error).strip().splitlines() or ["no message"]
    failed = WorkFailed(f"{type(error).__name__} while {doing}: {lines[0]}")
    failed.__cause__ = error
    return failed
