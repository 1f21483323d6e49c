"""Files of a repository of the model hub, in the hub's own cache on this machine.

    folder = fetch(HubSource("owner/name"), inspection.FILES, progress)    # the snapshot, a folder called by its commit
    listed_sha256(folder)                                                  # what the hub says of its large files

HF_ENDPOINT, HF_HOME and HF_TOKEN are obeyed. A snapshot may have some files of the repository alone: what was not asked
for yet is fetched when it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from splitlearn.checkpoints import inspection
from splitlearn.checkpoints.configuration import refuse_unusable
from splitlearn.checkpoints.folder import CONFIG, sha256
from splitlearn.errors import ModelUnavailable
from splitlearn.runtime import private_apis
from splitlearn.runtime.progress import Progress, Step, reporting_tqdm

# Seconds for the hub's first answer.
TIMEOUT_S = 10.0
_INSTEAD = (
    "What works: set HF_ENDPOINT to a mirror, or HF_HOME to a folder where the model was downloaded before; or set "
    "model.name to a local folder, or to smollm2-135m-instruct, which comes by pip."
)
_UNREACHABLE = "model hub cannot be reached"


@dataclass(frozen=True)
class HubSource:
    """A repository of the model hub, `owner/name`."""

    repo: str

    def __str__(self) -> str:
        return f"hub {self.repo}"

    def at(self, snapshot: Path) -> str:
        """The exact source of a snapshot: the hub's cache calls its folder by the commit."""
        return f"{self}@{snapshot.name}"


def fetch(source: HubSource, patterns: Sequence[str], progress: Progress) -> Path:
    """The repository's snapshot with its files of these patterns; missing ones are downloaded.

    If the hub does not give the model, a local snapshot that has them is used. Raises ModelUnavailable.
    """
    progress(Step(f"Asking the model hub for {source.repo}"))
    said = refusal(source)
    if said is None:
        try:
            first = _snapshot(source, [CONFIG, inspection.ADAPTER_CONFIG], progress)
            if not (first / CONFIG).exists():
                inspection.check_files(first)  # raises a better error for an adapter alone
            refuse_unusable(first / CONFIG)  # before downloading gigabytes
            return _snapshot(source, patterns, progress)
        except ModelUnavailable as error:
            said = str(error)
    return _here(source, patterns, said, progress)


def complete(source: HubSource, snapshot: Path, names: Sequence[str], progress: Progress) -> None:
    """Download those files of `names` that a snapshot lacks, of the same commit. Raises ModelUnavailable."""
    if not (absent := [name for name in names if not (snapshot / name).is_file()]):
        return
    if (said := refusal(source)) is None:
        try:
            _snapshot(source, names, progress, snapshot.name)
            return
        except ModelUnavailable as error:
            said = str(error)
    raise ModelUnavailable(f"The {said}. Its snapshot in {snapshot} lacks {', '.join(absent)}. {_INSTEAD}")


def refusal(source: HubSource) -> str | None:
    """Why the hub does not give this model, in words that follow "the"; None if it has the model.

    snapshot_download asks the same without a time limit: a silent hub held it for over 90 s.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(source.repo, timeout=TIMEOUT_S)
    except HfHubHTTPError as error:
        status = error.response.status_code
        why = ": no such model, or one that needs a login (HF_TOKEN)" if status in (401, 403, 404) else ""
        why = ": it is busy, try again later" if status in (429, 503) else why
        return f"model hub did not give {source.repo}: it answers with HTTP status {status}{why}"
    except Exception:  # from the HTTP library that the hub client chose
        return _UNREACHABLE
    return None


def whole_snapshot(source: HubSource) -> bool:
    """Whether this machine has all files of the model."""
    return any(not _missing(source, snapshot, inspection.FILES) for snapshot in _local_snapshots(source))


def listed_sha256(snapshot: Path) -> Mapping[str, str]:
    """The SHA-256 of each large file of the repository, as the hub lists them; nothing where that list is not here."""
    return private_apis.hub_sha256(snapshot.parents[1], snapshot.name)


def check(
    source: HubSource, snapshot: Path, progress: Progress, only: Sequence[str] | None = None
) -> Mapping[str, str]:
    """Check the SHA-256 of all large files of a snapshot, or of `only` some, and return them by name.

    Raises ModelUnavailable for a file that is not the one that the hub lists. It is removed, to be fetched anew.
    """
    listed = listed_sha256(snapshot)
    names = [name for name in (listed if only is None else only) if name in listed and _is_here(snapshot, name)]
    for count, name in enumerate(names):
        progress(Step("Checking the downloaded files", count, len(names)))
        path = snapshot / name
        if sha256(path) != listed[name]:
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            wrong = f"{name} of {source.repo} is not the file that the model hub lists (its SHA-256 differs)"
            raise ModelUnavailable(f"{wrong}. It was removed; another start fetches it anew.")
    return {name: listed[name] for name in names}


def _is_here(snapshot: Path, name: str) -> bool:
    """Whether a snapshot itself has a file. A hub may list any name, also one of a file elsewhere on this machine."""
    return Path(name).name == name and (snapshot / name).is_file()


def _here(source: HubSource, patterns: Sequence[str], said: str, progress: Progress) -> Path:
    """A local snapshot that has the files, since the hub does not give them: `said` is why."""
    snapshots = _local_snapshots(source)
    if not snapshots:
        here = f"{source.repo} is not here and the" if said == _UNREACHABLE else "The"
        raise ModelUnavailable(f"{here} {said}. {_INSTEAD}")
    lacking = {folder: _missing(source, folder, patterns) for folder in snapshots}
    whole = next((folder for folder, absent in lacking.items() if not absent), None)
    if whole is None:
        last, absent = next(iter(lacking.items()))
        raise ModelUnavailable(f"The {said}. Its snapshot in {last} lacks {', '.join(absent)}. {_INSTEAD}")
    progress(Step(f"The {said}. Its snapshot that is here is used"))
    return whole


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


def _missing(source: HubSource, snapshot: Path, patterns: Sequence[str]) -> list[str]:
    """The files of the hub's list that a snapshot lacks; without a list, those that its own files imply."""
    from huggingface_hub import get_cached_repo_tree

    try:
        listed = [file.path for file in get_cached_repo_tree(source.repo, revision=snapshot.name)]
    except Exception:  # downloaded by a program that keeps no list
        return inspection.missing(snapshot)
    needed = (name for name in listed if any(fnmatch(name, pattern) for pattern in patterns))
    return sorted(name for name in needed if not (snapshot / name).is_file())


def _snapshot(source: HubSource, patterns: Sequence[str], progress: Progress, commit: str | None = None) -> Path:
    """The snapshot's folder with the files of these patterns. Raises ModelUnavailable, worded as in `refusal`."""
    from huggingface_hub import snapshot_download

    def show(bar: Any) -> None:
        if bar.unit == "B" and bar.n:  # the other bars count files
            progress(Step(f"Downloading {source.repo}", bar.n, bar.total))

    bars = reporting_tqdm(show)
    try:
        return Path(snapshot_download(source.repo, revision=commit, allow_patterns=list(patterns), tqdm_class=bars))
    except Exception as error:  # from two HTTP libraries and the hub client
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelUnavailable(f"model hub did not give {source.repo}: {reason}") from error
