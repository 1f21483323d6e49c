"""What an answer can be held to; generation/grammar.py does it."""

from dataclasses import dataclass

from splitlearn.errors import InputError

FIELD = "response_format"
MAX_SCHEMA_BYTES = 64 * 1024


@dataclass(frozen=True)
class JsonFormat:
    """JSON: what the JSON Schema in the text `schema` describes, or any object for None.

    Raises InputError for a schema of too many bytes. Whether answers can be held to it is found out where they are
    generated.
    """

    schema: str | None = None

    def __post_init__(self) -> None:
        if self.schema is None:
            return
        try:
            size = len(self.schema.encode())
        except (AttributeError, UnicodeEncodeError) as error:
            raise InputError(FIELD, self.schema, "a JSON Schema as text in UTF-8") from error
        if size > MAX_SCHEMA_BYTES:
            raise InputError(FIELD, f"a schema of {size} bytes", f"at most {MAX_SCHEMA_BYTES}")
