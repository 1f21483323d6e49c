"""Which flags are applied on which side: the words for them, presets, and what can be applied where.

The words of the command line, the page and config.yaml are the same: `auto`, `default`, `all`, `none`, a preset, a list
`use_cache,float32_matmul_precision=high`, or groups for sides, `full:all client:use_cache trunk:none`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from splitlearn.errors import InputError, did_you_mean
from splitlearn.flags import auto
from splitlearn.flags.auto import Rule
from splitlearn.flags.registry import FLAGS, SIDES, Flag, Place, Side

TEXTS = (*FLAGS, *(f"{flag.name}={choice}" for flag in FLAGS.values() for choice in flag.unavailable_choices))
"""What an `Availability` says something of."""
DOES_NOT_ACT = "does not act on this side"
SETS = ("auto", "default", "all", "none")
"""Words that stand for a whole set, beside the presets."""

EARLIER_FULL = (
    "low_cpu_mem_usage,use_fast,inference_mode,float32_matmul_precision,cudnn_benchmark,torch_compile,use_cache,"
    "output_attentions,output_hidden_states"
)
EARLIER_CLIENT = "low_cpu_mem_usage,torch_compile,use_cache"
EARLIER_LIBRARY = "low_cpu_mem_usage,use_cache"
CACHE_LADDER = "use_cache,cache=static,torch_compile"
FAST_IN_ANY = (
    "low_cpu_mem_usage,use_fast,inference_mode,use_cache,cache,output_attentions,output_hidden_states,fast_top_k"
)
FAST_ON_CPU = f"{FAST_IN_ANY},head_overlap"
FAST = f"{FAST_ON_CPU},weight_dtype,float32_matmul_precision"
FAST_FLOAT32 = f"{FAST_ON_CPU},weight_prepack=blocks"
FAST_GPU = f"{FAST_IN_ANY},cuda_graph,torch_compile"


def _on_every_side(flags: str) -> Mapping[Side, str]:
    return dict.fromkeys(SIDES, flags)


PRESETS: Mapping[str, tuple[str, Mapping[Side, str]]] = {
    "fast": (
        "The fastest on a CPU, on every side: weights in 4 bits; answers may differ.",
        _on_every_side(FAST),
    ),
    "fast-float32": (
        "The fastest on a CPU with unchanged weights, on every side.",
        _on_every_side(FAST_FLOAT32),
    ),
    "fast-gpu": (
        "The fastest on a GPU, on every side: compiled stages, and a captured graph for one token's step.",
        _on_every_side(FAST_GPU),
    ),
    "earlier-full": (
        "The earlier system's full model: nine flags, on every side.",
        _on_every_side(EARLIER_FULL),
    ),
    "earlier-client": (
        "The earlier system's comparison: its full model with nine flags against its split client with three.",
        {"full": EARLIER_FULL, "client": EARLIER_CLIENT, "trunk": EARLIER_CLIENT},
    ),
    "earlier-library": (
        "The earlier system's library: two flags, on every side.",
        _on_every_side(EARLIER_LIBRARY),
    ),
    "cache-ladder": (
        "For the ladder: dynamic cache, static cache, static cache and torch.compile.",
        _on_every_side(CACHE_LADDER),
    ),
}


@dataclass(frozen=True)
class Availability(Mapping[Side, Mapping[str, str | None]]):
    """For each side and flag, why it cannot be applied there, or None; for some choices, as `name=choice`, too. `auto`
    is what the word `auto` means there."""

    reasons: Mapping[Side, Mapping[str, str | None]]
    auto: Mapping[Side, Rule]

    def __getitem__(self, side: Side) -> Mapping[str, str | None]:
        return self.reasons[side]

    def __iter__(self) -> Iterator[Side]:
        return iter(self.reasons)

    def __len__(self) -> int:
        return len(self.reasons)

    def with_side(self, side: Side, reasons: Mapping[str, str | None], rule: Rule) -> "Availability":
        """The same with another `side`."""
        return Availability({**self.reasons, side: reasons}, {**self.auto, side: rule})


@dataclass(frozen=True)
class FlagSet:
    """The applied flags of each side, each as `name`, or `name=choice` where the choice is not the usual one.

    Flags that do not act beside another one of the same side are left out.
    """

    full: frozenset[str] = frozenset()
    client: frozenset[str] = frozenset()
    trunk: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for side in SIDES:
            object.__setattr__(self, side, acting(self.of(side)))

    def of(self, side: Side) -> frozenset[str]:
        """The applied flags of `side`."""
        return {"full": self.full, "client": self.client, "trunk": self.trunk}[side]

    def with_side(self, side: Side, applied: frozenset[str]) -> "FlagSet":
        """The same with `applied` on `side`."""
        return replace(self, **{side: applied})

    def without(self, *names: str) -> "FlagSet":
        """The same with the flags `names` at their off arm on every side."""
        kept = {side: frozenset(text for text in self.of(side) if _name(text) not in names) for side in SIDES}
        return FlagSet(**kept)

    def only(self, *names: str) -> "FlagSet":
        """The same with every flag but `names` at its off arm on every side."""
        kept = {side: frozenset(text for text in self.of(side) if _name(text) in names) for side in SIDES}
        return FlagSet(**kept)

    def names(self) -> list[str]:
        """Flags applied on any side, in the registry's order."""
        applied = {_name(text) for side in SIDES for text in self.of(side)}
        return [name for name in FLAGS if name in applied]


def availability(places: Mapping[Side, Place]) -> Availability:
    """What can be applied at these places."""
    reasons = {side: {text: why_not(text, side, place) for text in TEXTS} for side, place in places.items()}
    return Availability(reasons, {side: automatic(place) for side, place in places.items()})


def automatic(place: Place) -> Rule:
    """What `auto` means at `place`."""
    return auto.choose(place.vector, place.device, place.dtype)


def why_not(text: str, side: Side, place: Place) -> str | None:
    """Why the flag `text`, as `name` or `name=choice`, cannot be applied on `side` at `place`, or None when it can."""
    name, _, choice = text.partition("=")
    flag = FLAGS[name]
    reason = _never(flag, side) or flag.unavailable(place)
    return reason or (flag.unavailable_choices[choice](place) if choice in flag.unavailable_choices else None)


def why_not_chosen(text: str, reasons: Mapping[str, str | None]) -> str | None:
    """Why the flag `text` with its choice cannot be applied, by the `reasons` of a side of an `Availability`."""
    name = _name(text)
    return reasons[name] or reasons.get(f"{name}={_choice(text)}")


def acting(applied: frozenset[str]) -> frozenset[str]:
    """Those of a side's `applied` flags that act: another one may replace them."""
    replaced = {name for text in applied for name in FLAGS[_name(text)].replaces.get(_choice(text), ())}
    return frozenset(text for text in applied if _name(text) not in replaced) if replaced else applied


def parse(text: str, available: Availability) -> FlagSet:
    """Parse flags as a person writes them. Raises InputError for an unknown flag, side or choice, and for a conflict.

    A flag that is named must be available on the side that is named with it, or on any side. Flags of `auto`,
    `default`, `all` and the presets are applied where they are available.
    """
    groups = text.split()
    if not any(":" in group for group in groups):
        words = ",".join(groups) or "none"
        return FlagSet(**{side: _group(words, side, available, asked=None) for side in SIDES})
    chosen: dict[Side, frozenset[str]] = {}
    for group in groups:
        name, _, words = group.partition(":")
        side = _side(name, group)
        if side in chosen:
            raise InputError("flags", text, f"one group for each side; {side} has two")
        chosen[side] = _group(words or "none", side, available, asked=side)
    unnamed = {side: _group("default", side, available, asked=None) for side in SIDES if side not in chosen}
    return FlagSet(**{**chosen, **unnamed})


def check(text: str) -> None:
    """Raise InputError for words that no machine could apply. It needs no knowledge of what is available here."""
    reasons = {side: {text: _never(FLAGS[_name(text)], side) for text in TEXTS} for side in SIDES}
    parse(text, Availability(reasons, dict.fromkeys(SIDES, auto.RULES[-1])))


def _never(flag: Flag, side: Side) -> str | None:
    return None if side in flag.sides else DOES_NOT_ACT


def _side(name: str, group: str) -> Side:
    for side in SIDES:
        if side == name:
            return side
    known = [f"{side}:" for side in SIDES]
    expected = f"groups that begin with one of: {', '.join(known)}"
    raise InputError("flags", group, expected + did_you_mean(f"{name}:", known))


def _group(words: str, side: Side, available: Availability, asked: Side | None) -> frozenset[str]:
    """The applied flags of one side. `asked` is the side that the person named, if one was."""
    names = [word for word in words.split(",") if word]
    sets = [word for word in names if word in {*SETS, *PRESETS}]
    if sets and len(names) > 1:
        raise InputError("flags", words, f"{sets[0]!r} to stand alone: it is a whole set of flags")
    if sets:
        word = available.auto[side].preset if sets[0] == "auto" else sets[0]
        return frozenset(text for text in _set(word, side) if available[side][_name(text)] is None)
    chosen = chosen_in(names)
    for text in chosen.values():
        _check_available(text, side, available, asked)
    return applied_of({name: text for name, text in chosen.items() if _reason(text, available[side]) is None})


def chosen_in(words: Sequence[str]) -> dict[str, str]:
    """The flags named in `words`, each with its canonical text. Raises InputError for an unknown flag or choice, and
    for two choices of one flag."""
    chosen: dict[str, str] = {}
    for word in words:
        name, text = _entry(word)
        if chosen.setdefault(name, text) != text:
            conflict = f"one choice of {name}; {chosen[name]!r} and {text!r} exclude each other"
            raise InputError("flags", ",".join(words), conflict)
    return chosen


def applied_of(chosen: Mapping[str, str]) -> frozenset[str]:
    """Those of `chosen` that are not at their off arm, and act."""
    return acting(frozenset(text for name, text in chosen.items() if not _is_off(text)))


def _set(word: str, side: Side) -> list[str]:
    if word in PRESETS:
        return PRESETS[word][1][side].split(",")
    if word == "default":
        return [name for name, flag in FLAGS.items() if flag.on_by_default and flag.fidelity != "lossy"]
    return [name for name, flag in FLAGS.items() if flag.in_all] if word == "all" else []


def _entry(word: str) -> tuple[str, str]:
    """One word as (flag name, its canonical text). Raises InputError for an unknown flag or choice."""
    name, equals, choice = word.partition("=")
    if name not in FLAGS:
        known = [*SETS, *PRESETS, *FLAGS]
        meant = did_you_mean(name, known)
        raise InputError("flags", name, f"a flag or a set of flags{meant}" if meant else f"one of: {', '.join(known)}")
    flag = FLAGS[name]
    if equals and choice not in flag.choices:
        raise InputError(f"flags: {name}", choice, f"one of: {', '.join(flag.choices)}")
    return name, word if equals and choice != flag.applied else name


def _check_available(text: str, side: Side, available: Availability, asked: Side | None) -> None:
    """Raise InputError for a flag that is named and available on none of the sides it is meant for."""
    reasons = {other: _reason(text, available[other]) for other in ([asked] if asked else SIDES)}
    if all(reasons.values()):
        said = "; ".join(f"{where}: {reason}" for where, reason in reasons.items())
        raise InputError("flags", text, f"a flag that can be applied here ({said})")


def _reason(text: str, reasons: Mapping[str, str | None]) -> str | None:
    """Why a named flag cannot be applied. At its off arm, only its name has to be known."""
    return reasons[_name(text)] if _is_off(text) else why_not_chosen(text, reasons)


def _is_off(text: str) -> bool:
    name, _, choice = text.partition("=")
    return choice == FLAGS[name].off


def _name(text: str) -> str:
    return text.partition("=")[0]


def _choice(text: str) -> str:
    name, _, choice = text.partition("=")
    return choice or FLAGS[name].applied
