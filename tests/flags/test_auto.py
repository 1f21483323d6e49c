"""What `auto` means, for every kind of processor, device and dtype."""

import pytest

from splitlearn.flags.auto import RULES, choose
from splitlearn.flags.registry import FLAGS, SIDES, Place
from splitlearn.flags.selection import PRESETS, SETS, availability, parse

PLACES = [
    (vector, device, dtype)
    for vector in ("avx512", "avx2", None)
    for device in ("cpu", "cuda:0", "mps")
    for dtype in ("float32", "bfloat16", "float16")
]


@pytest.mark.parametrize(
    ("vector", "device", "dtype", "preset"),
    [
        ("avx512", "cpu", "float32", "fast-float32"),
        ("avx2", "cpu", "float32", "fast-float32"),
        (None, "cpu", "float32", "default"),
        ("avx512", "cpu", "bfloat16", "default"),
        ("avx512", "cuda:0", "float32", "default"),
        ("avx2", "cuda:0", "bfloat16", "default"),
        (None, "mps", "float32", "default"),
    ],
)
def test_each_place_has_the_set_of_its_rule(vector: str | None, device: str, dtype: str, preset: str) -> None:
    assert choose(vector, device, dtype).preset == preset


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_auto_is_never_lossy_and_never_empty(place: tuple[str | None, str, str]) -> None:
    vector, device, dtype = place
    known = availability(dict.fromkeys(SIDES, Place(device, dtype=dtype, vector=vector)))
    flags = parse("auto", known)
    assert "use_cache" in flags.names()
    assert not [name for name in flags.names() if FLAGS[name].fidelity == "lossy"]


def test_auto_is_the_set_that_its_rule_names_on_each_side() -> None:
    fast, plain = Place("cpu", vector="avx512"), Place("cpu", vector=None)
    known = availability({"full": fast, "client": fast, "trunk": plain})
    flags = parse("auto", known)
    assert flags.full == parse("fast-float32", known).full
    assert flags.client == parse("fast-float32", known).client
    assert flags.trunk == parse("default", known).trunk
    assert parse("full:none client:auto trunk:auto", known).client == flags.client


def test_rules_name_sets_that_there_are_and_the_last_one_always_holds() -> None:
    assert {rule.preset for rule in RULES} <= {*SETS, *PRESETS} - {"auto"}
    assert all(RULES[-1].holds(*place) for place in PLACES)
