"""Keeps exported graphs beside the model's folder: each is made once.

    <model's folder>.onnx/0-30-first.onnx      the graph of the layers [0, 30) with the embeddings
    <model's folder>.onnx/0-30-first.json      what it was made of, and the graph's SHA-256

A graph is used if what it was made of is what it would be made of now, and its SHA-256 is that of the file. Any other
is made anew: a damaged one, another model's, or one by other versions. The description is written last, so that a kill
leaves nothing that is used. Where nothing can be written, the graph is made at each start.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.models.cut import CutModel
from splitlearn.runtime import atomic_file

log = logging.getLogger(__name__)
FORMAT = 2
PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")
MOST_BYTES = 1 << 28
"""Of a graph without its weights, or of its description."""


@dataclass(frozen=True)
class Origin:
    """What a graph was made of. `digest` is the model's."""

    digest: str
    start: int
    end: int
    first: bool
    last: bool
    versions: tuple[str, ...]
    format: int = FORMAT

    @classmethod
    def of(cls, cut: CutModel, files: ModelFiles) -> "Origin":
        """The origin of the graph of `cut`, made now."""
        versions = tuple(f"{name} {version(name)}" for name in PACKAGES)
        return cls(files.digest, cut.start, cut.end, cut.first, cut.last, versions)

    @property
    def name(self) -> str:
        """The name of its files."""
        ends = [word for word, has in (("first", self.first), ("last", self.last)) if has]
        return "-".join([str(self.start), str(self.end), *ends])


def kept(files: ModelFiles, origin: Origin, make: Callable[[], bytes]) -> bytes:
    """The graph with this origin, from its file or made by `make` and kept."""
    folder = files.folder.with_name(f"{files.folder.name}.onnx")
    if (graph := _read(folder, origin)) is not None:
        return graph
    try:
        folder.mkdir(exist_ok=True)
        with FileLock(folder / f"{origin.name}.lock"):  # one of several processes makes it
            if (graph := _read(folder, origin)) is not None:
                return graph
            graph = make()
            _write(folder, origin, graph)
    except OSError as error:
        log.warning("The exported graph %s cannot be kept in %s: %s.", origin.name, folder, error)
    return graph or make()


def _read(folder: Path, origin: Origin) -> bytes | None:
    """The graph in `folder`, None for none that may be used."""
    with suppress(OSError, ValueError, RecursionError):
        graph, description = (_bytes_of(folder / f"{origin.name}{suffix}") for suffix in (".onnx", ".json"))
        if json.loads(description) == _description(origin, graph):
            return graph
        log.info("The exported graph %s in %s is damaged or of something else: it is made anew.", origin.name, folder)
    return None


def _bytes_of(path: Path) -> bytes:
    """Raises ValueError for a file that is too large to be read."""
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} is no graph without weights")
    return path.read_bytes()


def _write(folder: Path, origin: Origin, graph: bytes) -> None:
    for left in folder.glob(f".{origin.name}.*"):  # by a process that was killed: we hold the lock
        left.unlink(missing_ok=True)
    atomic_file.write(folder / f"{origin.name}.onnx", graph)
    atomic_file.write(folder / f"{origin.name}.json", json.dumps(_description(origin, graph), indent=2))


def _description(origin: Origin, graph: bytes) -> dict[str, object]:
    """What the second file holds."""
    described: dict[str, object] = json.loads(json.dumps(asdict(origin)))
    return {**described, "sha256": hashlib.sha256(graph).hexdigest()}
