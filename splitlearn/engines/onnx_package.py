"""Writes a whole model as files that plain ONNX Runtime runs, without this program: `splitlearn export`.

model.onnx       the graph (onnx_export.py)
weights.bin      its weights
tokenizer.json   the model's own, if it has one
README.md        how to run them
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import onnx
import torch

from splitlearn.checkpoints.folder import ModelFiles, read_config
from splitlearn.engines import onnx_export
from splitlearn.engines.onnx_engine import shapes_for
from splitlearn.engines.reasons import no_onnxruntime
from splitlearn.errors import FamilyRefused, InputError
from splitlearn.runtime.progress import Progress, Step
from splitlearn.stages import loading
from splitlearn.stages.settings import LoadSettings

GRAPH, TOKENIZER, README = "model.onnx", "tokenizer.json", "README.md"
ALIGNMENT = 4096
"""Bytes. Weights begin at multiples of it, so that ONNX Runtime can map the file."""
HOW = """# {name} for ONNX Runtime

Written by `splitlearn export` from {source}. float32, for a CPU. Netron (netron.app) shows `model.onnx`. It needs
`pip install onnxruntime numpy`, and `tokenizers` to turn text into token ids.

```python
import sys

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
ids = [int(word) for word in sys.argv[2:]]
capacity = len(ids) + int(sys.argv[1])
past = [each for each in session.get_inputs() if each.name.startswith("past")]
cache = {{each.name: np.zeros([1, each.shape[1], capacity, each.shape[3]], np.float32) for each in past}}
position, new = 0, ids
while position + len(new) < capacity:
    given = {{"x": np.array([new]), "position": np.array(position), "rows": np.array([len(new) - 1])}}
    logits, *present = session.run(None, given | cache)
    cache = dict(zip(cache, present))
    position, new = position + len(new), [int(logits[0, -1].argmax())]
    print(new[0], flush=True)
```

Saved as `run.py`, `python run.py 20 504 6330` prints the 20 tokens, greedy, that follow the tokens 504 and 6330.

- `x` int64 [1, T]: the new tokens' ids. `position` int64 []: how many tokens are before them. `rows` int64 [K]: the
  numbers, among the new tokens, of those whose logits are wanted.
- `past_0`, `past_1` ... float32 [1, heads, capacity, size]: keys of layer 0, values of layer 0, keys of layer 1 and so
  on. What is behind `position` is not read. `present_0` ... are the same with the new tokens. Bound to the same memory
  (`io_binding`), nothing is copied.
- `out` float32 [1, K, vocabulary]: the logits.
"""


def write(files: ModelFiles, out: Path, progress: Progress) -> None:
    """Write the model into the new folder `out`.

    Raises InputError for a folder that is there, FamilyRefused for a model that ONNX Runtime does not compute as torch
    does, ModelError as `loading.load`, and OSError.
    """
    if out.exists():
        raise InputError("--onnx", str(out), "a folder that is not there yet")
    if reason := no_onnxruntime("cpu", "float32", read_config(files.folder)):
        raise FamilyRefused(f"{files.name} cannot be exported: ONNX Runtime {reason}")
    progress(Step("Loading the model"))
    placement = loading.Placement(torch.device("cpu"), torch.float32)
    specs = loading.full_specs(files.n_layers)
    cut = loading.load(files, specs, LoadSettings(assign_weights=True), placement).stages[0].cut
    progress(Step("Exporting the graph"))
    graph = onnx_export.export(cut, shapes_for(cut))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.partial-", dir=out.parent) as work:
        folder = Path(work) / "exported"
        folder.mkdir()
        progress(Step("Writing the weights"))
        _write_model(folder, graph, onnx_export.weights(graph, cut))
        if (files.folder / TOKENIZER).exists():
            shutil.copy(files.folder / TOKENIZER, folder)
        (folder / README).write_text(HOW.format(name=files.name, source=files.source), encoding="utf-8")
        folder.rename(out)


def _write_model(folder: Path, graph: bytes, weights: dict[str, Any]) -> None:
    """Write the graph, and its weights one after the other into a file of their own."""
    model = onnx.load_model_from_string(graph)
    with (folder / onnx_export.WEIGHTS).open("wb") as file:
        for tensor in model.graph.initializer:
            if tensor.name in weights:
                file.write(bytes(-file.tell() % ALIGNMENT))
                place = {"location": onnx_export.WEIGHTS, "offset": file.tell(), "length": weights[tensor.name].nbytes}
                del tensor.external_data[:]
                for key, value in place.items():
                    tensor.external_data.add(key=key, value=str(value))
                weights[tensor.name].tofile(file)
    (folder / GRAPH).write_bytes(model.SerializeToString())
