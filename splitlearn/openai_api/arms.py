"""The models of the endpoint: `NAME:full` and `NAME:split` of the configured model, with flags behind a question mark.

smollm2-135m-instruct:split?flags=fast-float32
"""

from urllib.parse import parse_qsl

from splitlearn.arms.runs import Runs
from splitlearn.errors import InputError, SplitlearnError
from splitlearn.events import KINDS, Kind
from splitlearn.flags.selection import FlagSet, check, parse
from splitlearn.openai_api.failures import ApiError


def ids(runs: Runs) -> list[str]:
    """The model ids, without flags. Of a model in a folder here nobody needs to know where that is."""
    name = runs.files.name.rstrip("/").rpartition("/")[2]
    return [f"{name}:{kind}" for kind in KINDS]


def arm(runs: Runs, model: str) -> tuple[Kind, FlagSet]:
    """The arm and flags that `model` means. Raises ApiError for an unknown one."""
    name, _, query = model.partition("?")
    kind = next((kind for kind, known in zip(KINDS, ids(runs), strict=True) if name == known), None)
    if kind is None:
        raise ApiError(
            404, f"model: {model!r} is not served here; there is {' and '.join(ids(runs))}", "model", "model_not_found"
        )
    try:
        return kind, _flags(runs, kind, _words(query) or runs.config.flags)
    except InputError as error:
        raise ApiError(400, str(error), "model", "invalid_value") from error
    except SplitlearnError as error:
        raise ApiError.of(error) from error


def _words(query: str) -> str:
    """The words of `flags=...`. Raises InputError for anything else."""
    pairs = parse_qsl(query, keep_blank_values=True)
    if query and (len(pairs) != 1 or pairs[0][0] != "flags"):
        raise InputError("model", query, "?flags= and nothing else behind the model's name")
    return pairs[0][1] if pairs else ""


def _flags(runs: Runs, kind: Kind, words: str) -> FlagSet:
    check(words)
    return runs.flags(words) if kind == "split" else parse(words, runs.availability_here)
