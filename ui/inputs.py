"""From what was typed on the page to a request. The library checks values; here text only becomes numbers."""

from collections.abc import Mapping

from splitlearn.config import GenerationConfig
from splitlearn.errors import InputError
from splitlearn.events import GenerationRequest
from splitlearn.sampling import SamplingParams

MAX_REPEATS = 1000


def request(typed: Mapping[str, object]) -> GenerationRequest:
    """The request for the fields of the page. Raises InputError that names the first field that cannot be used."""
    sampling = SamplingParams(
        temperature=decimal("temperature", typed["temperature"]),
        top_k=whole("top_k", typed["top_k"]),
        top_p=decimal("top_p", typed["top_p"]),
        repetition_penalty=decimal("repetition_penalty", typed["repetition_penalty"]),
        seed=whole("seed", typed["seed"]),
    )
    return GenerationRequest(
        prompt=str(typed["prompt"] or ""),
        max_new_tokens=whole("max_new_tokens", typed["max_new_tokens"]),
        chat=typed["form"] == "chat",
        ignore_eos=bool(typed["ignore_eos"]),
        stop=tuple(line for line in str(typed["stop"] or "").splitlines() if line),
        sampling=sampling,
    )


def at_first(settings: GenerationConfig) -> dict[str, str]:
    """What the number fields hold when the page opens."""
    usual = SamplingParams()
    return {
        "max_new_tokens": str(settings.max_new_tokens),
        "temperature": f"{usual.temperature:g}",
        "top_k": str(usual.top_k),
        "top_p": f"{usual.top_p:g}",
        "repetition_penalty": f"{usual.repetition_penalty:g}",
        "seed": str(usual.seed),
    }


def whole(field: str, typed: object) -> int:
    """`typed` as a whole number."""
    try:
        return int(str(typed).strip())
    except ValueError:
        raise InputError(field, typed, "a whole number") from None


def decimal(field: str, typed: object) -> float:
    """`typed` as a number; a decimal comma is understood."""
    try:
        return float(str(typed).strip().replace(",", "."))
    except ValueError:
        raise InputError(field, typed, "a number") from None


def repeats(typed: object) -> int:
    """How often each row of the per-flag table runs."""
    number = whole("repeats", typed)
    if not 1 <= number <= MAX_REPEATS:
        raise InputError("repeats", typed, f"a whole number from 1 to {MAX_REPEATS}")
    return number
