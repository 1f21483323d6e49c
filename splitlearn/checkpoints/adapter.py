"""Merges an adapter (LoRA and the like) beside a model into its weights with `peft`, or refuses it by name.

`peft` is no requirement of this program. Without it, a model with an adapter beside it is refused: the model alone
would compute something else than its folder says.
"""

import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from splitlearn.checkpoints.inspection import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapter_files,
    describe_adapter,
    read_json,
    unnamed_adapters,
)
from splitlearn.errors import ModelError

ALONE = "move the adapter's files away to use the model without it"


def check(folder: Path) -> None:
    """Raise ModelError for a folder with an adapter that cannot be applied here."""
    found = [path.name for path in adapter_files(folder)]
    if not found:
        _refuse_unnamed(folder)
        return
    what = f"{folder} has {describe_adapter(folder)} beside the model"
    whole = {ADAPTER_CONFIG, ADAPTER_WEIGHTS} <= set(found)
    if not whole or "peft_type" not in read_json(folder / ADAPTER_CONFIG):
        needed = f"it takes {ADAPTER_CONFIG} with a peft_type, and {ADAPTER_WEIGHTS}; there are {', '.join(found)}"
        raise ModelError(f"{what}, which cannot be applied: {needed}. What works: those two files, or {ALONE}.")
    if find_spec("peft") is None:
        raise ModelError(
            f"{what}, and peft, which applies it, is not installed. What works: pip install peft, or {ALONE}."
        )


def _refuse_unnamed(folder: Path) -> None:
    """Raise ModelError for an adapter's weights in a file of another name, which peft would not find."""
    if unnamed := [path.name for path in unnamed_adapters(folder)]:
        raise ModelError(
            f"{folder} has an adapter beside the model (lora tensors in {', '.join(unnamed)}), which cannot be "
            f"applied: it takes {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}. What works: those two files, or {ALONE}."
        )


def merged(model: Any, folder: Path) -> Any:
    """The transformers model with the adapter of `folder` merged into its weights.

    Raises ModelError if it does not fit the model: each of its tensors must have a place, and each place a tensor.
    """
    peft: Any = import_module("peft")
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            raise ValueError(f"{config.peft_type} changes prompts, not weights, and cannot be merged")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what does not fit raises below
            wrapped = peft.PeftModelForCausalLM(model, config)
            found = wrapped.load_adapter(str(folder), "default")
            merge = wrapped.merge_and_unload
    except Exception as error:  # peft raises exceptions of every kind
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ModelError(f"The adapter in {folder} cannot be applied to the model beside it ({reason}).") from error
    apart = sorted({*found.unexpected_keys, *found.missing_keys})
    if apart:
        raise ModelError(
            f"The adapter in {folder} does not fit the model beside it: {len(apart)} of its tensors have no "
            f"counterpart, among them {apart[0]}."
        )
    return merge()
