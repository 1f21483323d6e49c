"""Which flags are chosen, in the words of the command line: the page's controls all read and write these words."""

from splitlearn.arms.runs import Runs
from splitlearn.errors import SetupError, TrunkError
from splitlearn.flags.registry import FLAGS, SIDES, Place, Side
from splitlearn.flags.selection import PRESETS, SETS, Availability, FlagSet, availability, parse

NAMES = (*SETS, *PRESETS)


def available(runs: Runs) -> Availability:
    """Which flags can be applied where; a trunk that cannot be asked is no reason not to run the full model."""
    try:
        return runs.availability()
    except (TrunkError, SetupError):
        here = runs.availability_here
        return here.with_side("trunk", dict.fromkeys(FLAGS, "the trunk does not answer"), here.auto["trunk"])


def useful_first(place: Place) -> list[str]:
    """All flags; those of the fastest set that leaves the tokens as they are at `place` come first."""
    fastest = parse("auto", availability(dict.fromkeys(SIDES, place))).names()
    return sorted(FLAGS, key=lambda name: name not in fastest)


def words(flags: FlagSet, known: Availability) -> str:
    """The shortest words that mean `flags` here: the name of a set, a list for all sides, or a list for each side."""
    listed = ",".join(_in_order(flags.full | flags.client | flags.trunk)) or "none"
    by_side = " ".join(f"{side}:{','.join(_in_order(flags.of(side))) or 'none'}" for side in SIDES)
    same_choices = len({text.partition("=")[0] for text in listed.split(",")}) == len(listed.split(","))
    candidates = [*NAMES, listed] if same_choices else NAMES
    return next((text for text in candidates if parse(text, known) == flags), by_side)


def set_of(flags: FlagSet, known: Availability) -> str | None:
    """The name of the set of flags that is chosen, if it is one."""
    return next((name for name in NAMES if parse(name, known) == flags), None)


def about_auto(known: Availability) -> str:
    """What `auto` means here, and why: one line."""
    local, trunk = known.auto["full"], known.auto["trunk"]
    said = f"auto is {local.preset} here ({local.when})"
    return f"{said}." if trunk == local else f"{said}; at the trunk it is {trunk.preset} ({trunk.when})."


def with_choice(flags: FlagSet, name: str, choice: str, known: Availability) -> FlagSet:
    """`flags` with flag `name` at `choice` on every side where it is available."""
    changed, flag = flags.without(name), FLAGS[name]
    if choice == flag.off:
        return changed
    text = name if choice == flag.applied else f"{name}={choice}"
    for side in SIDES:
        if known[side][name] is None:
            changed = changed.with_side(side, changed.of(side) | {text})
    return changed


def choice_of(flags: FlagSet, name: str, known: Availability) -> str | None:
    """The choice of flag `name` where all sides that can have it agree; None where they differ."""
    sides = [side for side in SIDES if known[side][name] is None]
    chosen = {_choice_on(flags, name, side) for side in sides}
    return chosen.pop() if len(chosen) == 1 else None


def on_sides(chosen: dict[Side, list[str]]) -> str:
    """The words for a list of flags on each side."""
    return " ".join(f"{side}:{','.join(texts) or 'none'}" for side, texts in chosen.items())


def why_nowhere(name: str, known: Availability) -> str | None:
    """Why flag `name` can be applied on no side, or None when it can on some."""
    reasons = {side: known[side][name] for side in SIDES if side in FLAGS[name].sides}
    if not all(reasons.values()):
        return None
    said = {str(reason) for reason in reasons.values()}
    return said.pop() if len(said) == 1 else "; ".join(f"{side}: {reason}" for side, reason in reasons.items())


def _choice_on(flags: FlagSet, name: str, side: Side) -> str:
    for text in flags.of(side):
        if text.partition("=")[0] == name:
            return text.partition("=")[2] or FLAGS[name].applied
    return FLAGS[name].off


def _in_order(texts: frozenset[str]) -> list[str]:
    """In the registry's order."""
    names = list(FLAGS)
    return sorted(texts, key=lambda text: (names.index(text.partition("=")[0]), text))
