"""The cuts that can be attacked."""

from splitlearn.errors import InputError
from splitlearn.models.plan import SplitPlan


def plan_at(cut: int, usual: SplitPlan) -> SplitPlan:
    """The plan with `cut` layers before the trunk, which ends where that of `usual` does, if that is behind the cut.
    Raises InputError for a cut that the model does not have."""
    if not 1 <= cut < usual.n_layers:
        none = "behind no layer, the embeddings themselves are sent, which are as good as text"
        raise InputError("splits", cut, f"1 to {usual.n_layers - 1}: {none}")
    return SplitPlan(cut, max(usual.end, cut + 1), usual.n_layers)


def cuts_of(text: str) -> list[int]:
    """Whole numbers with commas between, each once. Raises InputError."""
    try:
        return list(dict.fromkeys(int(each) for each in text.split(",")))
    except ValueError as error:
        raise InputError("splits", text, "whole numbers such as 1,2,4") from error
