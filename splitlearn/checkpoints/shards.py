"""A sharded checkpoint: which of its files hold a part of the model, and how that part is read.

    sharded = Sharded.read(folder)          # opens config.json and the index alone
    sharded.tensors(part)                   # {name in the checkpoint: file}
    load(folder, part)                      # the model with these tensors alone

Names in a checkpoint may differ from those of the model that transformers builds. transformers' own rules map one to
the other (runtime/private_apis.py).
"""

import copy
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from splitlearn.checkpoints import inspection
from splitlearn.checkpoints.conformance import first_few, refuse_missing, refuse_unused
from splitlearn.checkpoints.folder import CONFIG
from splitlearn.errors import ModelError
from splitlearn.models.part import Part
from splitlearn.models.tensors import empty_model, tensor_names
from splitlearn.runtime import private_apis


@dataclass(frozen=True)
class Sharded:
    """A checkpoint's index, and the model of its configuration without weights. `names` maps names of the checkpoint to
    those of the model, `tied` names of the model to the one under which their tensor is stored."""

    model: Any
    weight_map: Mapping[str, str]
    names: Mapping[str, str]
    tied: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path) -> "Sharded":
        """The checkpoint in `folder`. Raises ModelError for a configuration that makes no model."""
        weight_map = inspection.weight_map(folder)
        inspection.check_layers(folder, len(weight_map))
        config = config_of(folder)
        try:
            model = empty_model(config, "eager", config.dtype)
            names = private_apis.checkpoint_names(model, weight_map)
        except Exception as error:  # from transformers, about an arbitrary configuration
            said = " ".join(str(error).split())[:300]
            raise ModelError(f"{folder / CONFIG} makes no model ({type(error).__name__}: {said}).") from error
        return cls(model, weight_map, names, dict(model.all_tied_weights_keys))

    @property
    def n_layers(self) -> int:
        """Layers of the whole model."""
        count: int = self.model.config.get_text_config().num_hidden_layers
        return count

    def own(self, part: Part) -> set[str]:
        """The names under which the model stores the tensors of `part`."""
        config = copy.deepcopy(self.model.config)  # a model that is made of it gives it a dtype
        return tensor_names(config, part, self.n_layers)

    def tensors(self, part: Part) -> dict[str, str]:
        """The tensors of the checkpoint that make up `part`, each with its file."""
        own = self.own(part)
        return {name: file for name, file in self.weight_map.items() if self._stored(self.names[name]) in own}

    def unclear(self) -> str:
        """A tensor that is tied to another one by the configuration and has values of its own in the checkpoint, too.
        Whether they are the same shows only in the weights. Empty for none."""
        placed = set(self.names.values())
        return next((name for name, first in self.tied.items() if {name, first} <= placed), "")

    def _stored(self, name: str) -> str:
        return self.tied.get(name, name)


def whole_only(folder: Path, hashed: Collection[str]) -> str:
    """Why a part of the checkpoint in `folder` cannot be had without the rest, as the end of a sentence; empty if it
    can. `hashed` are its files of which the hash is known."""
    if not inspection.is_sharded(folder) or inspection.WEIGHTS in hashed:
        return "its weights are one file"
    if inspection.adapter_files(folder) or inspection.of_adapter(hashed):
        return "an adapter changes its weights"
    config = inspection.read_json(folder / CONFIG)
    if "quantization_config" in config:
        return "its weights are quantized"
    if unknown := [name for name in inspection.shards_of(folder) if name not in hashed]:
        return f"the hub gives no SHA-256 of {first_few(unknown)}"
    if config_of(folder).dtype is None:
        return f"its {CONFIG} names no dtype"
    return ""


def load(folder: Path, part: Part) -> tuple[Any, dict[str, Any], set[str]]:
    """The model with the tensors of `part` and no others, its state dict as far as it is there, and the tensors of the
    checkpoint that the model has no place for. Opens only files that have a tensor of the part.

    Raises ModelError for a tensor that is missing, of another shape or cannot be converted.
    """
    sharded = Sharded.read(folder)
    model, where = sharded.model, sharded.tensors(part)
    unused = private_apis.unplaced(model, sharded.names.values())
    refuse_unused(folder, model, {"unexpected_keys": unused})
    try:
        with ExitStack() as stack:
            files = {name: stack.enter_context(safe_open(folder / name, "pt")) for name in sorted(set(where.values()))}
            slices = {name: files[file].get_slice(name) for name, file in where.items()}
            others, failed = private_apis.load_tensors(model, slices, model.config.dtype)
    except Exception as error:  # safetensors does not export its exceptions; transformers raises many
        raise ModelError(f"{folder} could not be loaded: {' '.join(str(error).split())[:300]}") from error
    if others or failed:
        odd = [f"{name} {list(has)} in the place of {list(wanted)}" for name, has, wanted in sorted(others)]
        odd += [f"{name} ({' '.join(why.split())[:200]})" for name, why in sorted(failed.items())]
        raise ModelError(f"{folder} could not be loaded: {first_few(odd)}.")
    state, own = model.state_dict(), sharded.own(part)
    missing = {name for name in own if name not in state or state[name].is_meta}
    refuse_missing(folder, {"missing_keys": missing, "mismatched_keys": [], "unexpected_keys": []})
    return model, {name: state[name] for name in state if name in own}, unused


def config_of(folder: Path) -> Any:
    """The transformers configuration of a checkpoint, without code or kernels that it names. Of one with a part for
    images it is the language model's, where that is a class of its own: AutoModelForCausalLM does the same."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        text = config.sub_configs.get("text_config")
        if text is not None and MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].config_class is text:
            config = config.get_text_config()
    except Exception as error:  # from transformers, about an arbitrary file
        said = " ".join(str(error).split())[:300]
        raise ModelError(f"{folder / CONFIG} cannot be used ({type(error).__name__}: {said}).") from error
    private_apis.forget_kernels(config)
    return config
