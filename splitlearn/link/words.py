"""The words for emulated links: presets, and a parser. `str(link)` is read back by `parse`.

parse("4g") == parse("rtt=70ms,jitter=10ms,up=12mbit,down=12mbit")
parse("wifi,rtt=20ms")        # a preset, with something changed
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from splitlearn.errors import InputError, did_you_mean
from splitlearn.link.emulated import NONE, WORDS, Link

EXPECTED = "a preset ({}), or words such as rtt=50ms,jitter=5ms,up=10mbit,down=100mbit,loss=0.1%"


@dataclass(frozen=True)
class Preset:
    """A link that many have, and where its figures come from."""

    link: Link
    label: str
    source: str


PRESETS: Mapping[str, Preset] = {
    NONE: Preset(Link(), "Loopback", "No link: bytes take as long as they do on the real one."),
    "lan": Preset(Link(0.5, 0, 1000, 1000), "LAN", "Gigabit Ethernet behind one switch: RTT below 1 ms."),
    "wifi": Preset(
        Link(4, 2, 100, 200),
        "Wi-Fi",
        "802.11ac, 80 MHz, next room: about half of its 433 Mbit/s arrive; its retransmissions show as jitter.",
    ),
    "4g": Preset(Link(70, 10, 12, 12), "4G", "WebPageTest's profile LTE: 12 Mbit/s each way, 70 ms; jitter assumed."),
    "5g": Preset(
        Link(25, 5, 50, 200),
        "5G",
        "Mid-band 5G with its core network: RTT of 20 to 30 ms; a fair share of a cell, assumed.",
    ),
    "transatlantic": Preset(
        Link(75, 1, 1000, 1000),
        "Transatlantic",
        "London to New York: 2 * 5,600 km at 200,000 km/s in glass are 56 ms, cables and routers make it 70 to 80.",
    ),
    "satellite": Preset(
        Link(600, 20, 5, 100, 0.1),
        "Satellite",
        "Geostationary: 4 * 35,786 km at the speed of light are 477 ms, coding and scheduling make it about 600.",
    ),
}
_UNITS: Mapping[str, Mapping[str, float]] = {
    "ms": {"ms": 1.0, "s": 1e3},
    "mbit": {"mbit": 1.0, "kbit": 1e-3, "gbit": 1e3},
    "%": {"%": 1.0},
}
_VALUE = re.compile(r"(\d+\.?\d*(?:e[+-]?\d+)?)\s*([a-z%]+)", re.ASCII)
LONGEST = 200


def preset_of(link: Link) -> str | None:
    """The name of the preset that `link` is."""
    return next((name for name, preset in PRESETS.items() if preset.link == link), None)


def parse(text: str, field: str = "link") -> Link:
    """The link that `text` names: a preset, words, or a preset changed by words. InputError names `field`."""
    first, *rest = [part.strip() for part in text[:LONGEST].lower().split(",")]
    preset = PRESETS.get(first)
    changed: dict[str, float] = {}
    for part in rest if preset else [first, *rest]:
        name, value = _word(part, text, field)
        if name in changed:
            raise InputError(field, text, f"each word once: {part!r} repeats one")
        changed[name] = value
    try:
        return replace(preset.link if preset else Link(), **changed)
    except InputError as error:
        raise InputError(field, text, f"for {error.field} {error.expected}") from error


def _word(part: str, text: str, field: str) -> tuple[str, float]:
    """The field of Link that `part` of `text` sets, and its value."""
    word, _, value = part.partition("=")
    known = WORDS.get(word.strip())
    if known is None:
        raise InputError(field, text, EXPECTED.format(", ".join(PRESETS)) + did_you_mean(text, PRESETS))
    name, unit = known
    found = _VALUE.fullmatch(value.strip())
    scale = _UNITS[unit].get(found[2]) if found else None
    if found is None or scale is None:
        units = ", ".join(_UNITS[unit])
        raise InputError(
            field, text, f"a number and a unit ({units}) after {word.strip()}=, such as {word.strip()}=5{unit}"
        )
    return name, float(found[1]) * scale
