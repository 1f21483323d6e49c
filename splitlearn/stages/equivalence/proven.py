"""The families that were proven, and the check before a model is cut."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from splitlearn.errors import FamilyRefused
from splitlearn.stages.equivalence.compare import Result, prove
from splitlearn.stages.equivalence.kinds import kinds

DATA = Path(__file__).parents[1] / "proven_families.json"


def check(config: Any, *, split: bool = True) -> None:
    """Check that an architecture runs exactly in steps, and can be cut exactly if it is to be `split`.

    A family that was not proven is tested on a tiny copy (2 s). So is a proven one whose configuration has kinds that
    were not tested (stages/equivalence/kinds.py), or if the version of transformers differs. Raises FamilyRefused with
    the reason if full or split differ from transformers' `generate()`, or do not run.
    """
    if _entry(config) is not None:
        return
    result = _tried(config)
    if not (result.exact if split else result.whole):
        raise FamilyRefused(f"{result.family} models cannot be {'cut' if split else 'run in steps'}: {result.reason}.")


def allows(config: Any) -> frozenset[str]:
    """What else is exact for this configuration, on either side of each boundary (stages/equivalence/together.py).
    Tested on a tiny copy if it was not proven."""
    entry = _entry(config)
    return frozenset(_tried(config).allows if entry is None else entry.get("allows", ()))


def _entry(config: Any) -> dict[str, Any] | None:
    """The generated entry of the family, or None if it does not hold for all kinds of this configuration."""
    data = proven()
    entry: dict[str, Any] | None = data["families"].get(config.model_type)
    same_version = data["transformers"] == transformers.__version__
    return entry if entry is not None and same_version and kinds(config) <= set(entry["kinds"]) else None


_results: dict[str, Result] = {}


def _tried(config: Any) -> Result:
    """The result of a test in this process, run once for each configuration."""
    key = config.to_json_string(use_diff=False)
    if key not in _results:
        _results[key] = prove(config)
    return _results[key]


def proven() -> dict[str, Any]:
    """The generated data: versions, "families" (proven) and "refused", by model type. Empty if there is no file."""
    if not DATA.exists():
        return {"transformers": "", "torch": "", "families": {}, "refused": {}}
    data: dict[str, Any] = json.loads(DATA.read_text())
    return data


def write(results: Sequence[Result]) -> None:
    """Write the data of a whole run, ordered by name."""
    ordered = sorted(results, key=lambda result: result.family)
    data = {
        "transformers": transformers.__version__,
        "torch": torch.__version__.partition("+")[0],
        "families": {
            result.family: {
                "architecture": result.architecture,
                "difference": result.difference,
                "notes": list(result.notes),
                "kinds": list(result.kinds),
                "allows": list(result.allows),
            }
            for result in ordered
            if result.exact
        },
        "refused": {
            result.family: {"architecture": result.architecture, "reason": result.reason}
            for result in ordered
            if not result.exact
        },
    }
    DATA.write_text(json.dumps(data, indent=1) + "\n")
