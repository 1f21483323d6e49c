"""`response_format` of a chat: free text, any JSON object, or what a JSON Schema describes."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from splitlearn.errors import InputError
from splitlearn.openai_api.messages import Part
from splitlearn.response_format import FIELD, JsonFormat


class JsonSchema(Part):
    """A JSON Schema. Answers are held to it whatever `strict` says; name and description change nothing."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None

    def json_format(self) -> JsonFormat:
        """The same in this program's words. Raises InputError."""
        try:
            return JsonFormat(json.dumps(self.schema_, ensure_ascii=False))
        except RecursionError as error:
            raise InputError(FIELD, self.name, "a schema that is less deep") from error


class ResponseFormat(Part):
    """A format; `json_schema` belongs to the type of that name."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def json_format(self) -> JsonFormat | None:
        """The same in this program's words. Raises InputError."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise InputError(FIELD, self.type, "json_schema with the type json_schema, and only with it")
        if self.json_schema is not None:
            return self.json_schema.json_format()
        return None if self.type == "text" else JsonFormat()
