"""The file of bearer tokens: reads it and makes new tokens. The file stores only SHA-256."""

import hashlib
import secrets
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from splitlearn.errors import InputError

SECRET_BYTES = 32


class Token(BaseModel):
    """One entry of the token file. `tokens_per_second` limits the positions computed, of prompts and answers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(min_length=1)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    sessions: Annotated[int, Field(ge=1)]
    tokens_per_second: Annotated[float, Field(ge=0.01)]
    expires: datetime | date | None = None

    def expired(self) -> bool:
        """Whether the token has expired. A date without a time means its first moment; no time zone means UTC."""
        if self.expires is None:
            return False
        end = self.expires
        moment = end if isinstance(end, datetime) else datetime(end.year, end.month, end.day)
        return datetime.now(UTC) >= (moment if moment.tzinfo else moment.replace(tzinfo=UTC))


def load(path: Path, setting: str) -> tuple[Token, ...]:
    """The tokens of the file that `setting` names. Raises InputError, which does not quote the file, if it is
    unusable."""
    shape = "a YAML list of entries as `python -m splitlearn token NAME` prints them"
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(setting, str(path), f"a readable file ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(setting, str(path), shape) from error
    try:
        tokens = TypeAdapter(tuple[Token, ...]).validate_python(tuple(data) if isinstance(data, list) else data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(setting, str(path), f"{shape}; {place}: {first['msg']}") from error
    for field in ("name", "sha256"):
        if len({getattr(token, field) for token in tokens}) < max(1, len(tokens)):
            raise InputError(setting, str(path), f"at least one entry, each with a {field} of its own")
    return tokens


def digest(secret: str) -> str:
    """SHA-256 in hex: the form of a secret in the token file."""
    return hashlib.sha256(secret.encode()).hexdigest()


def make(name: str) -> tuple[str, str]:
    """A new secret, and its YAML entry for the token file."""
    secret = secrets.token_urlsafe(SECRET_BYTES)
    entry = {"name": name, "sha256": digest(secret), "sessions": 2, "tokens_per_second": 200.0}
    return secret, yaml.safe_dump([entry], sort_keys=False, allow_unicode=True)
