"""Every exception that splitlearn raises on purpose.

    SplitlearnError
    |-- InputError          a value that a person or a peer gave: names the field, the value and what would be right
    |-- ModelError          weights or architecture
    |   |-- ModelUnavailable   not in the cache and not to be had from here
    |   |-- WeightsDamaged     a cached file is not what was written
    |   |-- FamilyRefused      the architecture cannot be cut exactly
    |   `-- NotFinite          what was computed is no number: NaN, or beyond what the dtype holds
    |-- TrunkError          the far end of a split
    |   |-- TrunkUnavailable   nobody answers, or the connection was lost
    |   |   |-- TrunkLate          it would answer too late: the step was dropped
    |   |   `-- TrunkForgot        it does not have (any more) what a session was to branch from
    |   |-- TrunkRefused       the trunk serves something else, or did not accept what was sent
    |   |   `-- TrunkDenied       it asks for a token, and the one that it got, if any, is not valid
    |   |-- TrunkFull          no room for a session now
    |   `-- TrunkFailed        the trunk broke while computing
    |-- StepUnwanted        whoever asked for a step wants it no more: it was given up
    |-- WorkFailed          a worker process met an error that nobody foresaw, and goes on
    |-- WorkerDied          a worker process ended without a word (killed, out of memory)
    `-- SetupError          the program cannot start here as asked (a port is taken, no login for a shared page)

The message of each is one or two sentences for the person at the keyboard; nothing needs its traceback.
"""


class SplitlearnError(Exception):
    """The root: catch this to catch all that is below."""


class InputError(SplitlearnError):
    """A value that cannot be used. `field` is the name a person knows it by (a config key, an option, a wire field)."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field}: {value!r} cannot be used; expected {expected}.")
        self.field = field
        self.value = value
        self.expected = expected

    def __reduce__(self) -> tuple[type["InputError"], tuple[str, object, str]]:
        """Crosses a process boundary with its three parts; a value of no plain type as text."""
        plain = isinstance(self.value, str | int | float | None)
        return type(self), (self.field, self.value if plain else repr(self.value), self.expected)


class StepUnwanted(SplitlearnError):
    """Whoever asked for the step wants it no more: what was computed of it is of no use."""


class ModelError(SplitlearnError):
    """Weights or architecture: the model cannot be used as it is."""


class ModelUnavailable(ModelError):
    """The weights are not in the cache and cannot be fetched from here."""


class WeightsDamaged(ModelError):
    """A file in the cache is not what was written there."""


class FamilyRefused(ModelError):
    """The architecture cannot be cut into stages that give the full model's logits."""


class NotFinite(ModelError):
    """The model computed NaN or Inf, from which no token can be chosen: names the layer where that began."""


class TrunkError(SplitlearnError):
    """The trunk server did not do what was asked. `cause`: why, in the word by which a server counts it."""

    def __init__(self, message: str, cause: str = "") -> None:
        super().__init__(message)
        self.cause = cause


class TrunkUnavailable(TrunkError):
    """Nobody answers at the address, or the connection was lost."""


class TrunkLate(TrunkUnavailable):
    """The trunk dropped a step that had waited for longer than its client said that it would."""


class TrunkForgot(TrunkUnavailable):
    """The trunk does not have, or not any more, the session that another one was to branch from."""


class TrunkRefused(TrunkError):
    """The trunk serves something else than what was asked for, or refused what was sent."""


class TrunkDenied(TrunkRefused):
    """The trunk lets in those with a valid token only."""


class TrunkFull(TrunkError):
    """The trunk has no room for another session at the moment. `retry_s`: seconds after which it may have."""

    def __init__(self, message: str, retry_s: float = 1.0, cause: str = "") -> None:
        super().__init__(message, cause)
        self.retry_s = retry_s


class TrunkFailed(TrunkError):
    """The trunk broke while it computed."""


class WorkFailed(SplitlearnError):
    """A worker process met an error that nobody foresaw while it loaded or computed; the process itself goes on."""


class WorkerDied(SplitlearnError):
    """A worker process ended without saying why: killed, or out of memory."""


class SetupError(SplitlearnError):
    """The program cannot start here as asked."""


def as_error(error: Exception, doing: str) -> SplitlearnError:
    """`error` if it is one of ours; otherwise a WorkFailed with its kind and first line."""
    if isinstance(error, SplitlearnError):
        return error
    lines = str(error).strip().splitlines() or ["no message"]
    failed = WorkFailed(f"{type(error).__name__} while {doing}: {lines[0]}")
    failed.__cause__ = error
    return failed
