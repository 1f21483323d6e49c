"""The families that were proven, and what is asked before a model is cut."""

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
    """Return for an architecture that runs exactly in steps, and can be cut exactly if it is to be `split`; a family
    that was not proven is tried on a tiny copy (2 s).

    So is a proven one with anything that decides how it computes and that its proof did not have
    (stages/equivalence/kinds.py), and every one under another version of transformers than the proof's. Raises
    FamilyRefused with the reason when full or split differ from transformers' `generate()`, or do not run.
    """
    if _entry(config) is not None:
        return
    result = _tried(config)
    if not (result.exact if split else result.whole):
        raise FamilyRefused(f"{result.family} models cannot be {'cut' if split else 'run in steps'}: {result.reason}.")


def allows(config: Any) -> frozenset[str]:
    """What else was found to give the same with a model of this configuration, on either side of each of its boundaries
    (stages/equivalence/together.py); tried on a tiny copy like the rest."""
    entry = _entry(config)
    return frozenset(_tried(config).allows if entry is None else entry.get("allows", ()))


def _entry(config: Any) -> dict[str, Any] | None:
    """What was generated for the family, where it holds for all that this configuration has."""
    data = proven()
    entry: dict[str, Any] | None = data["families"].get(config.model_type)
    same_version = data["transformers"] == transformers.__version__
    return entry if entry is not None and same_version and kinds(config) <= set(entry["kinds"]) else None


_results: dict[str, Result] = {}


def _tried(config: Any) -> Result:
    """The result of a proof here, once for each configuration in this process."""
    key = config.to_json_string(use_diff=False)
    if key not in _results:
        _results[key] = prove(config)
    return _results[key]


def proven() -> dict[str, Any]:
    """The generated data: versions, "families" (proven) and "refused", by model type; empty before it was generated."""
    if not DATA.exists():
        return {"transformers": "", "torch": "", "families": {}, "refused": {}}
    data: dict[str, Any] = json.loads(DATA.read_text())
    return data


def write(results: Sequence[Result]) -> None:
    """Write the data of a whole run, in the order of the names."""
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
