"""Writes a slice of a converted model: a converted folder with the tensors of one part, which needs nothing else."""

import shutil
import tempfile
from pathlib import Path

from safetensors import safe_open

from splitlearn.checkpoints.folder import MANIFEST, WEIGHTS, ModelFiles, read_config, seal_part
from splitlearn.checkpoints.weights_file import write_tensors
from splitlearn.errors import InputError, ModelError
from splitlearn.models.part import Part
from splitlearn.models.tensors import tensor_names
from splitlearn.runtime.progress import Progress, Step


def pack(whole: ModelFiles, part: Part, target: Path, progress: Progress) -> None:
    """Write `part` of the model `whole` into the new folder `target`. Its digest is that of the whole.

    `whole` may be a slice with that part. Raises InputError if `target` is there already, ModelError for a slice that
    lacks some of it.
    """
    if whole.part is not None and not whole.part.covers(part):
        raise ModelError(f"{whole.folder} has {whole.part} of {whole.name} alone, and {part} are asked for.")
    if target.exists():
        raise InputError("OUT", str(target), "a folder that is not there yet")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.partial-", dir=target.parent) as work:
        folder = Path(work) / "packed"
        shutil.copytree(whole.folder, folder, ignore=shutil.ignore_patterns(WEIGHTS, MANIFEST))
        progress(Step(f"Writing {part}"))
        names = tensor_names(read_config(whole.folder), part, whole.n_layers)
        with safe_open(whole.weights, framework="pt") as weights:
            write_tensors({name: weights.get_tensor(name) for name in sorted(names)}, folder / WEIGHTS)
        seal_part(folder, whole, part, progress)
        folder.rename(target)
