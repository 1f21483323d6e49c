"""Convert chosen flags to and from the words of the command line, which all of the page's controls read and write."""

from splitlearn.arms.runs import Runs
from splitlearn.errors import SetupError, TrunkError
from splitlearn.flags.registry import FLAGS, SIDES, Place, Side
from splitlearn.flags.selection import PRESETS, SETS, TEXTS, Availability, FlagSet, availability, parse, why_not_chosen

NAMES = (*SETS, *PRESETS)


def available(runs: Runs) -> Availability:
    """The available flags of each side. If the trunk cannot be reached, only its own flags are unavailable."""
    try:
        return runs.availability()
    except (TrunkError, SetupError):
        here = runs.availability_here
        return here.with_side("trunk", dict.fromkeys(TEXTS, "the trunk does not answer"), here.auto["trunk"])


def useful_first(place: Place) -> list[str]:
    """The names of all flags. Those that `auto` applies at `place` come first."""
    fastest = parse("auto", availability(dict.fromkeys(SIDES, place))).names()
    return sorted(FLAGS, key=lambda name: name not in fastest)


def words(flags: FlagSet, known: Availability) -> str:
    """The shortest words for `flags` here: the name of a set, one list for all sides, or a list for each side."""
    listed = ",".join(_in_order(flags.full | flags.client | flags.trunk)) or "none"
    by_side = " ".join(f"{side}:{','.join(_in_order(flags.of(side))) or 'none'}" for side in SIDES)
    same_choices = len({text.partition("=")[0] for text in listed.split(",")}) == len(listed.split(","))
    candidates = [*NAMES, listed] if same_choices else NAMES
    return next((text for text in candidates if parse(text, known) == flags), by_side)


def set_of(flags: FlagSet, known: Availability) -> str | None:
    """The name of the set that equals `flags`, or None."""
    return next((name for name in NAMES if parse(name, known) == flags), None)


def about_auto(known: Availability) -> str:
    """One line on what `auto` is here, and why."""
    local, trunk = known.auto["full"], known.auto["trunk"]
    text = f"auto is {local.preset} here ({local.when})"
    return f"{text}." if trunk == local else f"{text}; at the trunk it is {trunk.preset} ({trunk.when})."


def with_choice(flags: FlagSet, name: str, choice: str, known: Availability) -> FlagSet:
    """`flags` with flag `name` at `choice` on every side where it is available."""
    changed, flag = flags.without(name), FLAGS[name]
    if choice == flag.off:
        return changed
    text = name if choice == flag.applied else f"{name}={choice}"
    for side in SIDES:
        if why_not_chosen(text, known[side]) is None:
            changed = changed.with_side(side, changed.of(side) | {text})
    return changed


def choice_of(flags: FlagSet, name: str, known: Availability) -> str | None:
    """The choice of flag `name` on all sides where it is available; None if they differ."""
    sides = [side for side in SIDES if known[side][name] is None]
    chosen = {_choice_on(flags, name, side) for side in sides}
    return chosen.pop() if len(chosen) == 1 else None


def on_sides(chosen: dict[Side, list[str]]) -> str:
    """The words for one list of flags per side."""
    return " ".join(f"{side}:{','.join(texts) or 'none'}" for side, texts in chosen.items())


def why_nowhere(name: str, known: Availability) -> str | None:
    """Why flag `name` can be applied on no side, or None if it can on some."""
    reasons = {side: known[side][name] for side in SIDES if side in FLAGS[name].sides}
    if not all(reasons.values()):
        return None
    texts = {str(reason) for reason in reasons.values()}
    return texts.pop() if len(texts) == 1 else "; ".join(f"{side}: {reason}" for side, reason in reasons.items())


def _choice_on(flags: FlagSet, name: str, side: Side) -> str:
    for text in flags.of(side):
        if text.partition("=")[0] == name:
            return text.partition("=")[2] or FLAGS[name].applied
    return FLAGS[name].off


def _in_order(texts: frozenset[str]) -> list[str]:
    """In the registry's order."""
    names = list(FLAGS)
    return sorted(texts, key=lambda text: (names.index(text.partition("=")[0]), text))
