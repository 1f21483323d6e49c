"""Which runs the rates come from."""

from splitlearn.flags.selection import FlagSet
from splitlearn.planning.measure import arms_of

CACHE = frozenset({"use_cache", "inference_mode"})


def test_full_and_split_are_enough_where_the_client_has_the_full_models_flags() -> None:
    flags = FlagSet(full=CACHE, client=CACHE, trunk=frozenset())
    assert arms_of(flags) == {"full": ("full", flags), "split": ("split", flags)}


def test_a_split_whose_sides_work_at_once_is_also_run_in_turn() -> None:
    flags = FlagSet(full=CACHE, client=CACHE | {"head_overlap"}, trunk=frozenset())
    in_turn = FlagSet(full=CACHE, client=CACHE, trunk=frozenset())
    assert arms_of(flags) == {"full": ("full", flags), "split": ("split", flags), "in_turn": ("split", in_turn)}


def test_the_runs_keep_no_prefixes() -> None:
    kept = CACHE | {"prefix_cache"}
    assert arms_of(FlagSet(kept, kept, kept)) == arms_of(FlagSet(CACHE, CACHE, CACHE))


def test_the_whole_model_is_also_run_with_the_clients_flags_where_they_differ() -> None:
    flags = FlagSet(full=frozenset(), client=CACHE | {"weight_prepack=blocks", "head_overlap"}, trunk=CACHE)
    kind, whole = arms_of(flags)["whole"]
    assert (kind, whole) == ("full", FlagSet(full=CACHE | {"weight_prepack=blocks"}))
