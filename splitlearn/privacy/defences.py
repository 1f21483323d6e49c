"""The defences of a sweep, each alone, by their words: the choice of a flag, or `rotation` and `own_weights`, which are
no flags."""

from splitlearn.flags.registry import FLAGS, settings
from splitlearn.privacy.registry import Attack

NONE, ROTATION, OWN_WEIGHTS = "none", "rotation", "own_weights"


def words() -> list[str]:
    """All of them, `none` first."""
    flags = [FLAGS["wire_dtype"], *(flag for flag in FLAGS.values() if flag.defence)]
    choices = [f"{flag.name}={choice}" for flag in flags for choice in flag.choices if choice != flag.off]
    return [NONE, *choices, ROTATION, OWN_WEIGHTS]


def flags_of(word: str) -> frozenset[str]:
    """The flags of a client and its trunk with this defence."""
    return frozenset() if word in (NONE, ROTATION, OWN_WEIGHTS) else frozenset({word})


def knowledge(word: str, attack: Attack) -> tuple[bool | None, ...]:
    """The kinds of attackers: whether they know the defence. None where there is nothing to know, or where it makes no
    difference: the server reads the form on the wire, and the flags change nothing of what it sends back."""
    if word == ROTATION:
        return (False, True)
    if word == OWN_WEIGHTS:  # who knows of them asks, and learns from that
        return (False, True) if attack.learns else (None,)
    changes = bool(settings(flags_of(word)).session.defences)
    return (False, True) if changes and attack.reads == "sent" else (None,)
