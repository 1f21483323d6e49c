"""Checks a checkpoint's folder before anything of it is loaded.

The folder is hostile until it is checked. `check_files` and `check_whole` open only regular files with a model's names,
read JSON of bounded size, and follow no index out of the folder. They raise ModelError that names every file at fault.
"""

import json
import stat
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from splitlearn.checkpoints.folder import CONFIG
from splitlearn.errors import InputError, ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
CHAT_TEMPLATES = "additional_chat_templates"
FILES = (
    WEIGHTS,
    "model-*-of-*.safetensors",
    INDEX,
    CONFIG,
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
    "tekken.json",
    f"{CHAT_TEMPLATES}/*.jinja",
    ADAPTER_CONFIG,
    "adapter_model*",
    "adapters.safetensors",
    "adapters.npz",
    "modules.json",
)
"""The files of a model and of an adapter. No other file is downloaded from the hub."""
_WEIGHTS = (WEIGHTS, "model-*-of-*.safetensors", "adapter_model*", "adapters.safetensors", "adapters.npz")
SMALL = tuple(pattern for pattern in FILES if pattern not in _WEIGHTS)
"""Those without weights."""
_OF_ADAPTERS = (ADAPTER_CONFIG, "adapter_model*", "adapters.safetensors", "adapters.npz")
_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "tekken.json")
# Where a folder may hold models: each in a folder of its own, or as in the hub's cache.
_MODELS_INSIDE = ("*", "snapshots/*")
_POINTER = b"version https://git-lfs.github.com/spec/"
# The largest known tokenizer.json has 35 MB.
_JSON_BYTES = 64 << 20
_MOST_NAMES = 40
FLOATS = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the dtypes of plain weights."""
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def find(path: Path) -> Path:
    """The folder of a model, or the GGUF file: `path` itself, or the one in the folder if it has no other weights.

    Raises InputError for a file of another kind, and for a folder with several GGUF files.
    """
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path
        raise InputError(
            "model.name", str(path), "a folder with a model or a .gguf file; this is a file of another kind"
        )
    if _weights_in(path):
        return path
    found = sorted(each for each in path.iterdir() if each.suffix.lower() == ".gguf" and each.is_file())
    if len(found) > 1:
        raise InputError(
            "model.name", str(path), f"one of the GGUF files there: {_listed(str(each) for each in found)}"
        )
    return found[0] if found else path


def check_files(source: Path, shards: Sequence[str] | None = None) -> None:
    """Raise ModelError unless `source` is a GGUF file or a model's folder whose files can be read.

    The content of the weights is not checked. `shards` are the files of weights that must be there, None for all that
    the index names.
    """
    if source.is_file():
        _check_readable([source])
        _check_whole_gguf(source)
        return
    if shards is None:
        _check_readable([*files(source), *_absent_shards(source)])
    else:  # no other file of weights is opened
        _check_readable([*files(source, SMALL), *(source / name for name in shards)])
    if not _weights_in(source) and adapter_files(source):
        raise ModelError(_adapter_alone(source))
    if not (source / CONFIG).exists():
        inside = sorted(path.parent for pattern in _MODELS_INSIDE for path in source.glob(f"{pattern}/{CONFIG}"))
        found = f" What is in it: {_listed(str(folder) for folder in inside)}." if inside else ""
        raise ModelError(f"{source} has no {CONFIG}, so it is no model's folder.{found}")
    if "sentence_transformers" in _text(source / "modules.json"):
        raise ModelError(
            f"{source} is a sentence-transformers model (modules.json): it gives embeddings of text, not a next token."
        )


def check_whole(folder: Path, shards: Sequence[str] | None = None) -> None:
    """Raise ModelError unless `folder` has all of the model's weights, or those in the files `shards`, and a
    tokenizer."""
    tensors = _check_weights(folder, shards)
    check_layers(folder, len(tensors) if shards is None else len(weight_map(folder)))
    _check_dtypes(folder, tensors)
    if not any(files(folder, _VOCABULARIES)):
        raise ModelError(f"{folder} has no tokenizer: tokenizer.json, a .model file, vocab.json or vocab.txt.")


def files(folder: Path, patterns: Iterable[str] = FILES) -> Iterator[Path]:
    """The files of `folder` that match, by name. Of its subfolders only the one with chat templates is searched."""
    inside = (each for each in sorted(folder.iterdir()) if not each.is_dir())
    for path in (*inside, *chat_templates(folder)):
        if any(fnmatch(path.relative_to(folder).as_posix(), pattern) for pattern in patterns):
            yield path


def chat_templates(folder: Path) -> list[Path]:
    """The files of named chat templates."""
    return sorted((folder / CHAT_TEMPLATES).glob("*.jinja"))


def adapter_files(folder: Path) -> list[Path]:
    """The files of an adapter in `folder`."""
    return list(files(folder, _OF_ADAPTERS))


def of_adapter(names: Iterable[str]) -> list[str]:
    """Those of `names` that are files of an adapter."""
    return [name for name in names if any(fnmatch(name, pattern) for pattern in _OF_ADAPTERS)]


def is_sharded(folder: Path) -> bool:
    """Whether the weights in `folder` are those that an index names. A file with all of them goes before the index."""
    return (folder / INDEX).is_file() and not (folder / WEIGHTS).exists()


def model_files(folder: Path) -> list[Path]:
    """The files of the model itself, without those of an adapter beside it."""
    others = adapter_files(folder)
    return [path for path in files(folder) if path not in others]


def unused_weights(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder that are neither loaded nor an adapter's."""
    loaded = {WEIGHTS} if (folder / WEIGHTS).exists() else set(shards_of(folder)) if is_sharded(folder) else set()
    found = sorted(folder.glob("*.safetensors")) if loaded else []
    return [path for path in found if path.name not in loaded and path not in adapter_files(folder)]


def unnamed_adapters(folder: Path) -> list[Path]:
    """The safetensors files with an adapter's tensors that do not have an adapter's name."""
    return [path for path in unused_weights(folder) if any("lora_" in name for name, _ in _readable_tensors(path))]


def missing(folder: Path) -> list[str]:
    """The names of files that a snapshot of the hub lacks, as far as its own files imply them."""
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        needed = [CONFIG, *shards_of(folder)]
    else:
        needed = [CONFIG, WEIGHTS]
    absent = [name for name in needed if not (folder / name).is_file()]
    return absent if any(files(folder, _VOCABULARIES)) else [*absent, "tokenizer.json"]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file from an untrusted source. Raises ModelError that names the file."""
    try:
        data = json.loads(_bounded(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({_first_line(error)}).") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} cannot be read: it holds no JSON object.")
    return data


def _bounded(path: Path) -> bytes:
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no regular file")
    if path.stat().st_size > _JSON_BYTES:
        raise ValueError(f"it has {path.stat().st_size:,} bytes; at most {_JSON_BYTES:,} are read")
    return path.read_bytes()


def _text(path: Path) -> str:
    return _bounded(path).decode("utf-8", errors="replace") if path.is_file() else ""


def _check_readable(paths: Iterable[Path]) -> None:
    """Raise ModelError that names all git-lfs pointers and unreadable files."""
    faults = {path: fault for path in paths if (fault := _fault(path))}
    if not faults:
        return
    folder = next(iter(faults)).parent
    message = f"{folder}: {_listed((f'{path.name} {fault}' for path, fault in faults.items()), '; ')}."
    if _IS_POINTER in faults.values():
        message += " `git lfs pull` there brings the files that the pointers stand for."
    raise ModelError(message)


_IS_POINTER = "is a git-lfs pointer and not the file itself"


def _fault(path: Path) -> str:
    """What is wrong with a file, as the end of a sentence; empty if it can be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would block
            return "is no regular file"
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                return _IS_POINTER
        if path.suffix == ".json" and path.name != "modules.json":  # which holds a list
            read_json(path)
    except FileNotFoundError:
        return "is a link to a file that is not there" if path.is_symlink() else f"is missing, and {INDEX} names it"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except ModelError as error:
        return str(error).removeprefix(f"{path} ").rstrip(".")
    return ""


def _tensors_in(path: Path) -> list[tuple[str, str]]:
    """The tensors of a safetensors file, each with its dtype. Raises ModelError, also if the file is cut short."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="np") as weights:
            return [(name, weights.get_slice(name).get_dtype()) for name in weights.keys()]  # noqa: SIM118
    except Exception as error:  # safetensors does not export its exceptions
        raise ModelError(
            f"{path} cannot be read as safetensors, it may be cut short ({_first_line(error)})."
        ) from error


def _readable_tensors(path: Path) -> list[tuple[str, str]]:
    """`_tensors_in`, or nothing for a file that cannot be read: it is not loaded."""
    try:
        return [] if _fault(path) else _tensors_in(path)
    except ModelError:
        return []


def _weights_in(folder: Path) -> bool:
    return any((folder / name).exists() or (folder / name).is_symlink() for name in (WEIGHTS, INDEX))


def _check_weights(folder: Path, only: Sequence[str] | None) -> list[tuple[str, str]]:
    """The tensors in the weights of `folder`, each with its dtype. Raises ModelError that names all that is missing."""
    named = read_json(folder / CONFIG).get("transformers_weights")
    if named not in (None, WEIGHTS, INDEX):
        raise ModelError(f"{folder / CONFIG}: transformers_weights {named!r} cannot be used; expected {WEIGHTS}.")
    if not _weights_in(folder):
        raise ModelError(_without_weights(folder))
    shards = weight_files(folder) if only is None else only
    found, broken = [], []
    for name in shards:
        try:
            found += _tensors_in(folder / name)
        except ModelError as error:
            broken.append(str(error))
    if broken:
        raise ModelError(_listed(broken, " "))
    return found


def weight_files(folder: Path) -> list[str]:
    """The files with the weights that are loaded. Raises as `shards_of`."""
    return [WEIGHTS] if (folder / WEIGHTS).exists() else shards_of(folder)


def shards_of(folder: Path) -> list[str]:
    """The files that the index names. Raises ModelError if it names anything but files beside it."""
    return sorted(set(weight_map(folder).values()))


def weight_map(folder: Path) -> dict[str, str]:
    """The name of each tensor in the index, with its file. Raises as `shards_of`."""
    index = folder / INDEX
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{index} has no weight_map with the file of each tensor.")
    odd = sorted({repr(name) for name in names.values() if not _is_plain(name)})
    if odd:
        raise ModelError(f"{index} may name .safetensors files beside it only, and names {_listed(odd)}.")
    return names


def _absent_shards(folder: Path) -> list[Path]:
    """The missing files that a readable index names."""
    index = folder / INDEX
    if (folder / WEIGHTS).exists() or not index.is_file() or _fault(index):
        return []
    return [folder / name for name in shards_of(folder) if not (folder / name).exists()]


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors") and name.isprintable()


def _without_weights(folder: Path) -> str:
    """The error text for a folder without loadable weights."""
    others = [path.name for path in sorted(folder.iterdir()) if path.suffix == ".safetensors"]
    if others:
        return f"{folder} has neither {WEIGHTS} nor {INDEX}, and {_listed(others)} alone cannot be loaded."
    pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    found = f": {_listed(pickles)}" if pickles else ""
    return f"{folder} has no safetensors weights; pickled weights (.bin, .pt) are not loaded{found}."


def check_layers(folder: Path, tensors: int) -> None:
    """Raise ModelError for more layers than tensors; they would all be built before the weights were missed."""
    config = read_json(folder / CONFIG)
    text = config.get("text_config")
    for settings in (config, text if isinstance(text, dict) else {}):
        for key in _LAYER_COUNTS:
            count = settings.get(key)
            if isinstance(count, int | float) and count > tensors:
                raise ModelError(f"{folder / CONFIG}: {key} is {count}, and the weights have {tensors} tensors.")


def _check_dtypes(folder: Path, tensors: Sequence[tuple[str, str]]) -> None:
    """Raise ModelError for quantized weights that transformers would take for plain numbers."""
    odd = [f"{name} ({dtype})" for name, dtype in tensors if name.endswith(".weight") and dtype not in FLOATS]
    if odd and read_json(folder / CONFIG).get("quantization_config") is None:
        raise ModelError(
            f"{folder} has quantized weights, and {CONFIG} does not say which quantization: {_listed(odd)}."
        )


def _adapter_alone(folder: Path) -> str:
    what = describe_adapter(folder)
    return (
        f"{folder} is {what}, without that model. What works: put its files into the folder of that model, where peft "
        "applies them; or merge the two (merge_and_unload of peft), save the result, and set model.name to that folder."
    )


def describe_adapter(folder: Path) -> str:
    """A phrase for the adapter in `folder` and the model it is for. Raises ModelError for an unreadable config."""
    if not (folder / ADAPTER_CONFIG).exists():
        return f"an adapter without its {ADAPTER_CONFIG}, for a model that it does not name"
    config = read_json(folder / ADAPTER_CONFIG)
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    return f"an adapter ({ADAPTER_CONFIG}: {kind or 'no peft_type'}) for the model {base or 'that it does not name'}"


def _check_whole_gguf(path: Path) -> None:
    if fnmatch(path.name, "*-[0-9]*-of-[0-9]*.gguf"):
        raise ModelError(f"{path} is a part of a GGUF model; merge the parts with llama-gguf-split --merge first.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is no GGUF file: it does not begin with the letters GGUF.")


def _listed(names: Iterable[str], between: str = ", ") -> str:
    listed = list(names)
    more = f"{between}and {len(listed) - _MOST_NAMES} more" if len(listed) > _MOST_NAMES else ""
    return between.join(listed[:_MOST_NAMES]) + more


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
