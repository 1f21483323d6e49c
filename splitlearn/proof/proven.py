"""The families that were proven, and what is asked before a model is cut."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from splitlearn.errors import FamilyRefused
from splitlearn.proof.compare import Result, prove
from splitlearn.proof.tiny import layer_kinds

DATA = Path(__file__).parents[1] / "proven_families.json"


def check(config: Any) -> None:
    """Return for an architecture that can be cut exactly; a family that was not proven is tried on a tiny copy (2 s).

    So is a proven one with a kind of layer that its proof did not have, and every one under another version of
    transformers than the proof's. Raises FamilyRefused with the reason when the split differs or does not run.
    """
    data = proven()
    entry = data["families"].get(config.model_type)
    same_version = data["transformers"] == transformers.__version__
    if entry is not None and same_version and layer_kinds(config) <= set(entry["kinds"]):
        return
    result = prove(config)
    if not result.exact:
        raise FamilyRefused(f"{result.family} models cannot be cut: {result.reason}.")


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
