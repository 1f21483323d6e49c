"""A converted model folder: its files, the check that they are unchanged, and its digest.

    config.json               the architecture, without any quantization
    generation_config.json    if the model has one
    tokenizer files           with the chat templates, if any; several have a folder
    model.safetensors         every tensor of the full model's state_dict() under its own name; tied ones stored once
    manifest.json             format, source, facts of the model, and size, SHA-256 and mtime of each other file

`seal` writes the manifest of a complete folder; `open_folder` checks a folder against it. The digest is the SHA-256
over the hash of the weights and the keys of config.json that change the computation. Two machines that converted the
same model have the same digest, wherever the folder is.

The hash of the weights is that of the file model.safetensors here. Where the manifest has `weights_sha256`, it is that
one: of a sharded checkpoint the `fingerprint` of its files, which who has fetched some of them knows, too.

A slice is such a folder with the tensors of one part of the model. Its manifest also has `part`, the `weights_sha256`
of the whole model, and its `name` if it was packed from a folder of that name: so the digest is that of the whole.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from splitlearn.errors import WeightsDamaged
from splitlearn.models.part import Part
from splitlearn.runtime import atomic_file, private_apis
from splitlearn.runtime.progress import Progress, Step

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
# Bytes. Tensors in the weights file begin at multiples of it, as torch's own allocations do.
ALIGNMENT = 64
# Bytes of a weights file's header, which lists its tensors.
MOST_HEADER = 1 << 26
# Types of rotary embeddings whose `factor` extends the context.
SCALING = ("dynamic", "yarn")
# A larger factor is a mistake; JSON files may hold infinity.
MOST_SCALED = 1e6
# BertTokenizer's Python class reads it; it is kept beside tokenizer.json if the model has it.
PYTHON_VOCABULARY = "vocab.txt"

# Keys of config.json that choose kernels. They may name code of the hub.
KERNELS = {"_attn_implementation", "attn_implementation", "_experts_implementation", "experts_implementation"}
# Keys of config.json that name the model's origin or the file's writer, not the computation. The stored tensors' dtype
# is in the weights file itself.
_NAMES_ONLY = {"_name_or_path", "_model_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}


@dataclass(frozen=True)
class ModelFacts:
    """Facts of the whole model, which no part of it knows alone.

    `context_length` is the number of positions that it was made for, with the scaling of its rotary embeddings, or None
    without a limit. `tied` maps names of the state dict to the name under which their tensor is stored
    (`lm_head.weight` to the embedding).
    """

    model_type: str
    n_layers: int
    hidden_size: int
    vocab_size: int
    context_length: int | None
    tied: Mapping[str, str]


@dataclass(frozen=True)
class ModelFiles:
    """A checked converted folder. `name` is the model's name for people, `source` its origin. `part` is what a slice
    has of the model; None is all."""

    name: str
    source: str
    folder: Path
    digest: str
    facts: ModelFacts
    part: Part | None = None

    @property
    def weights(self) -> Path:
        """The safetensors file with the full model's state dict, or with a part of it."""
        return self.folder / WEIGHTS

    @property
    def config(self) -> Path:
        """The model's config.json."""
        return self.folder / CONFIG

    @property
    def n_layers(self) -> int:
        """Layers of the full model."""
        return self.facts.n_layers


def seal(folder: Path, source: str, facts: ModelFacts, progress: Progress, **more: object) -> None:
    """Write manifest.json for all files now in `folder`, which must be complete. `more` are further entries of it."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    files = {}
    for count, name in enumerate(names):
        progress(Step("Hashing the converted files", count, len(names)))
        status = (folder / name).stat()
        files[name] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": sha256(folder / name)}
    progress(Step("Hashing the converted files", len(names), len(names)))
    _write(folder, {"format": FORMAT, "source": source, "facts": asdict(facts), "files": files, **more})


def seal_part(folder: Path, whole: ModelFiles, part: Part, progress: Progress) -> None:
    """As `seal`, for a folder with the tensors of a `part` of `whole`."""
    manifest = json.loads((whole.folder / MANIFEST).read_text(encoding="utf-8"))
    facts, weights_hash = ModelFacts(**manifest["facts"]), _weights_hash(manifest)
    seal(folder, whole.source, facts, progress, name=whole.name, weights_sha256=weights_hash, part=asdict(part))


def open_folder(folder: Path, name: str) -> ModelFiles:
    """Check `folder` against its manifest and return its files and facts.

    A file is hashed again only if its mtime differs from the manifest's. Raises WeightsDamaged that names the file,
    what is wrong with it, and what to do.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, this program reads {FORMAT}")
        files, source, facts = manifest["files"], str(manifest["source"]), ModelFacts(**manifest["facts"])
        if outside := [file for file in files if Path(file).is_absolute() or ".." in Path(file).parts]:
            raise ValueError(f"it names {outside[0]!r}, which is not in the folder")
        weights_hash = _weights_hash(manifest)
        part = Part.read(manifest["part"]) if "part" in manifest else None
        if not _plausible(facts):
            raise ValueError("its facts are not those of a model")
        moved = [file for file, written in files.items() if _moved(folder, file, written)]
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        digest = _digest(config, weights_hash)
        facts = replace(facts, context_length=_scaled(facts.context_length, config))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(folder, MANIFEST, f"cannot be read ({error})") from error
    if moved:
        _note_times(folder, manifest, moved)
    return ModelFiles(str(manifest.get("name", name)), source, folder, digest, facts, part)


def read_config(folder: Path) -> Any:
    """The transformers configuration of a converted folder. Code that it names is not run."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        vars(config).pop("auto_map", None)  # the names of that code: who gets this need not think of it
        private_apis.forget_kernels(config)
        return config
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(folder, CONFIG, f"cannot be used ({' '.join(str(error).split())[:300]})") from error


def source_of(folder: Path) -> str:
    """The origin of the model in `folder`, without checking its files."""
    try:
        return str(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["source"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "unknown (its manifest is damaged)"


def weights_sha256(folder: Path) -> str:
    """The hash that stands for all weights of the model in `folder`, without checking its files. Raises
    WeightsDamaged."""
    try:
        return _weights_hash(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(folder, MANIFEST, f"cannot be read ({error})") from error


def parameters(folder: Path) -> int | None:
    """How many numbers the weights file of `folder` holds, by its header: tied ones count once. None for a file that
    is no such file."""
    try:
        with (folder / WEIGHTS).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            tensors = json.loads(file.read(min(length, MOST_HEADER)))
        return sum(math.prod(map(int, tensor["shape"])) for name, tensor in tensors.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def sha256(path: Path) -> str:
    """The file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(hashes: Iterable[str]) -> str:
    """The hash that stands for all weights of a sharded checkpoint: SHA-256 over those of its files, sorted."""
    return hashlib.sha256(" ".join(sorted(hashes)).encode()).hexdigest()


def _weights_hash(manifest: Mapping[str, Any]) -> str:
    """The hash that stands for all weights of the model."""
    return str(manifest.get("weights_sha256") or manifest["files"][WEIGHTS]["sha256"])


def _plausible(facts: ModelFacts) -> bool:
    counts = (facts.n_layers, facts.hidden_size, facts.vocab_size)
    return all(type(count) is int and count > 0 for count in counts) and isinstance(facts.tied, dict)


def _moved(folder: Path, file: str, written: Mapping[str, object]) -> bool:
    """Whether the file's mtime differs from the manifest's. Raises WeightsDamaged if its content does."""
    try:
        status = (folder / file).stat()
    except FileNotFoundError as error:
        raise _damaged(folder, file, "is missing") from error
    if status.st_size != written["size"]:
        raise _damaged(folder, file, f"has {status.st_size:,} bytes instead of {written['size']:,}")
    if status.st_mtime_ns == written["mtime_ns"]:
        return False
    if sha256(folder / file) != written["sha256"]:
        raise _damaged(folder, file, "has other content than was written (its SHA-256 differs)")
    return True


def _note_times(folder: Path, manifest: dict[str, dict[str, dict[str, object]]], moved: list[str]) -> None:
    """Write new mtimes of unchanged files (a copied folder) into the manifest, so that no start hashes them again."""
    for file in moved:
        manifest["files"][file]["mtime_ns"] = (folder / file).stat().st_mtime_ns
    try:
        _write(folder, manifest)
    except OSError:
        return  # a read-only volume: each start hashes again


def _write(folder: Path, manifest: Mapping[str, object]) -> None:
    atomic_file.write(folder / MANIFEST, json.dumps(manifest, indent=2))


def _scaled(length: int | None, config: Mapping[str, Any]) -> int | None:
    """The context length after the scaling that the configuration names; `length` is max_position_embeddings.

    `dynamic` and `yarn` rotary embeddings reach `factor` times as far as they were trained:
    original_max_position_embeddings if the configuration has it, else max_position_embeddings. Other types give their
    reach in max_position_embeddings (longrope, llama3) or not at all (linear).
    """
    rope = (config.get("text_config") or config).get("rope_parameters") or {}
    entries = [each for each in (rope, *rope.values()) if isinstance(each, Mapping)]  # one for each type of layer
    if length is None:
        return None
    reached = [
        int(factor * (each.get("original_max_position_embeddings") or length))
        for each in entries
        if each.get("rope_type") in SCALING and 1 <= (factor := each.get("factor") or 1) < MOST_SCALED
    ]
    return max([length, *reached])


def _digest(config: Mapping[str, Any], weights_hash: str) -> str:
    """SHA-256 in hex over the weights' hash and the canonical JSON of the config's keys that matter."""
    matters = {key: value for key, value in config.items() if key not in _NAMES_ONLY}
    return hashlib.sha256((weights_hash + json.dumps(matters, sort_keys=True)).encode()).hexdigest()


def _damaged(folder: Path, file: str, wrong: str) -> WeightsDamaged:
    return WeightsDamaged(f"{folder / file} {wrong}. Delete the folder {folder} and start again: it is fetched anew.")
