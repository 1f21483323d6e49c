"""Check the types of an API call's arguments: a caller may send any JSON value in any place."""

from collections.abc import Sequence

from splitlearn.errors import InputError


def text(field: str, value: object) -> str:
    """`value` as text. Raises InputError."""
    if not isinstance(value, str):
        raise InputError(field, value, "text")
    return value


def truth(field: str, value: object) -> bool:
    """`value` as true or false. Raises InputError."""
    if not isinstance(value, bool):
        raise InputError(field, value, "true or false")
    return value


def texts(field: str, value: object) -> Sequence[str]:
    """`value` as a list of non-empty texts. Raises InputError."""
    if not isinstance(value, list) or not all(isinstance(each, str) and each for each in value):
        raise InputError(field, value, "a list of texts, none of them empty")
    return value


def form(field: str, value: object) -> bool | str:
    """`value` as what `generation.chat` may be. Raises InputError."""
    if not isinstance(value, bool | str):
        raise InputError(field, value, "true, false or the name of a chat template")
    return value
