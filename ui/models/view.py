"""The list of models as HTML: size, availability, licence and source."""

from collections.abc import Mapping, Sequence
from html import escape

from splitlearn.arms.model_choice import Choice
from ui import html
from ui.format import MISSING, size
from ui.model.view import count

ASKING = "not cached; asking the model hub"


def models(choices: Sequence[Choice], in_use: str, failures: Mapping[str, str], probed: bool) -> str:
    """A row for each model. `failures` has the error of a model's last load, by name; `probed` is whether the hub was
    asked."""
    rows = [
        (
            escape(choice.status.name),
            MISSING if choice.status.parameters is None else f"{count(choice.status.parameters)}",
            size(choice.status.cached_bytes) if choice.status.folder else MISSING,
            _state(choice, in_use, probed) + _failure(failures.get(choice.name, "")),
            escape(choice.status.entry.licence if choice.status.entry else MISSING),
            escape(choice.status.source),
        )
        for choice in choices
    ]
    head = html.head_row("Model", "Parameters", "On disk", "Available?", "Licence", "Source")
    return html.table(head, rows, "Models")


def _state(choice: Choice, in_use: str, probed: bool) -> str:
    status = choice.status
    if choice.name == in_use:
        return '<b class="sl-on">in use</b>'
    if choice.why_not:
        return f'<span class="sl-off">no: {escape(choice.why_not)}</span>'
    if status.folder is not None or status.entry is None:
        return "yes, it is cached"
    if not probed and status.source.startswith("hub "):
        return ASKING
    return f"yes, after a download of {size(status.entry.download_bytes)}"


def _failure(error: str) -> str:
    return f"<br>The last try: {escape(error)}" if error else ""
