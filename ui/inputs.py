"""Parse the page's fields into requests. Here text only becomes numbers; the library checks the values."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from splitlearn.breakdown import check_pairs
from splitlearn.checkpoints.chat_template import DEFAULT
from splitlearn.config import GenerationConfig
from splitlearn.errors import InputError
from splitlearn.events import GenerationRequest
from splitlearn.lab.analysis.pairing import ServiceLevel
from splitlearn.lab.request import DELTA, MINUTES, PROMPTS_LIMIT, ExperimentRequest
from splitlearn.link import words
from splitlearn.link.emulated import NONE, Link
from splitlearn.sampling import SamplingParams

PAIRS = 20


def request(typed: Mapping[str, object]) -> GenerationRequest:
    """The request for the page's fields; the prompt is a text, or messages. Raises InputError, which names the first
    invalid field."""
    sampling = SamplingParams(
        temperature=decimal("temperature", typed["temperature"]),
        top_k=whole("top_k", typed["top_k"]),
        top_p=decimal("top_p", typed["top_p"]),
        repetition_penalty=decimal("repetition_penalty", typed["repetition_penalty"]),
        seed=whole("seed", typed["seed"]),
    )
    return GenerationRequest(
        prompt=prompt if isinstance(prompt := typed["prompt"] or "", tuple) else str(prompt),
        max_new_tokens=whole("max_new_tokens", typed["max_new_tokens"]),
        chat=chat(str(typed["form"])),
        ignore_eos=bool(typed["ignore_eos"]),
        stop=_stops(typed["stop"]),
        sampling=sampling,
        samples=whole("samples", typed["samples"]),
    )


def _stops(typed: object) -> tuple[str, ...]:
    """The stop strings: a list, or the lines of a text."""
    return tuple(typed) if isinstance(typed, list) else tuple(line for line in str(typed or "").splitlines() if line)


def pairs(typed: Mapping[str, object]) -> int:
    """How often each arm runs. Raises InputError."""
    chosen = whole("pairs", typed["pairs"])
    check_pairs(chosen)
    return chosen


def link(typed: Mapping[str, object]) -> Link:
    """The emulated link. Raises InputError."""
    return words.parse(str(typed["link"] or NONE))


def drawn(text: str | None) -> dict[str, Any]:
    """What controls were last set to, from the JSON in the page; nothing if an API client sends anything else."""
    try:
        values = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


RAW, CHAT = "raw", "chat"


def forms(templates: Sequence[str]) -> list[tuple[str, str]]:
    """The choices of "Prompt as" for a model with these chat templates: label and value."""
    usual = [("Chat template, where the model has one", CHAT)] if not templates or DEFAULT in templates else []
    named = [(f"Chat template {name}", f"{CHAT}:{name}") for name in templates if name != DEFAULT]
    return [*usual, *named, ("Raw prompt", RAW)]


def form(chat: bool | str) -> str:
    """The choice for a value of `generation.chat`."""
    return f"{CHAT}:{chat}" if isinstance(chat, str) and chat != DEFAULT else CHAT if chat else RAW


def chat(form: str) -> bool | str:
    """The `chat` of a request for a choice."""
    return form.removeprefix(f"{CHAT}:") if form.startswith(f"{CHAT}:") else form == CHAT


def at_first(settings: GenerationConfig) -> dict[str, str]:
    """Initial values of the number fields."""
    usual = SamplingParams()
    return {
        "max_new_tokens": str(settings.max_new_tokens),
        "temperature": f"{usual.temperature:g}",
        "top_k": str(usual.top_k),
        "top_p": f"{usual.top_p:g}",
        "repetition_penalty": f"{usual.repetition_penalty:g}",
        "seed": str(usual.seed),
        "samples": "1",
    }


def whole(field: str, typed: object) -> int:
    """`typed` as a whole number."""
    try:
        return int(str(typed).strip())
    except ValueError:
        raise InputError(field, typed, "a whole number") from None


def decimal(field: str, typed: object) -> float:
    """`typed` as a number. A decimal comma is accepted."""
    try:
        return float(str(typed).strip().replace(",", "."))
    except ValueError:
        raise InputError(field, typed, "a number") from None


def experiment(typed: Mapping[str, Any], flags: str, prompt: str) -> ExperimentRequest:
    """The experiment for the Lab tab's fields. Without prompts there it uses the page's `prompt`."""
    lines = (typed["prompts"] or "").strip() or prompt
    prompts = tuple(line.strip() for line in lines.splitlines() if line.strip())
    if not 1 <= len(prompts) <= PROMPTS_LIMIT:
        raise InputError("prompts", lines.strip(), f"1 to {PROMPTS_LIMIT} prompts, one on each line")
    fixed = typed["limit"] == "pairs"
    return ExperimentRequest(
        flags=flags,
        design=typed["design"],
        pairs=whole("pairs", typed["pairs"]) if fixed else None,
        minutes=None if fixed else decimal("minutes", typed["minutes"]),
        delta=decimal("delta", typed["delta"]),
        prompts=prompts,
        max_new_tokens=whole("max_new_tokens", typed["tokens"]),
        seed=whole("seed", typed["order_seed"]),
    )


def lab_at_first(settings: GenerationConfig) -> dict[str, str]:
    """Initial values of the Lab tab's text fields."""
    usual = ServiceLevel()
    return {
        "minutes": f"{MINUTES:g}",
        "pairs": str(PAIRS),
        "delta": f"{DELTA:g}",
        "tokens": str(settings.max_new_tokens),
        "order_seed": "0",
        "prompts": "",
        "ttft_ms": f"{usual.ttft_s * 1e3:g}",
        "decode_tps": f"{usual.decode_tps:g}",
    }


def service_level(typed: Mapping[str, Any]) -> ServiceLevel:
    """The service level for the typed thresholds."""
    ttft_ms, decode_tps = (_above_zero(name, typed[name]) for name in ("ttft_ms", "decode_tps"))
    return ServiceLevel(ttft_ms / 1e3, decode_tps)


def _above_zero(field: str, typed: object) -> float:
    value = decimal(field, typed)
    if not 0 < value < math.inf:  # here, since on the page the unit and the name differ
        raise InputError(field, typed, "a number above 0")
    return value
