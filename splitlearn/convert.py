"""Turns a checkpoint that transformers can read into the converted folder of store.py.

`convert` does it in this process; `convert_apart` in a process of its own, so that its peak of memory (twice the model)
goes with it, and reports that process's progress and errors. The child, `python -m splitlearn.convert SOURCE TARGET
[--gguf NAME]`, writes JSON lines: {"step": [label, done, total]}, then {"facts": {...}} or {"error": "..."}.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import tqdm.auto  # type: ignore[import-untyped]

from splitlearn.errors import ModelError
from splitlearn.progress import Progress, Step, reporting_tqdm
from splitlearn.store import ALIGNMENT, PYTHON_VOCABULARY, WEIGHTS, ModelFacts


def convert_apart(source: Path, target: Path, gguf: str | None, progress: Progress) -> ModelFacts:
    """As `convert`, in a child process. Raises ModelError also when the child is killed."""
    command = [sys.executable, "-m", "splitlearn.convert", str(source), str(target)]
    command += ["--gguf", gguf] if gguf else []
    root = str(Path(__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as complaints:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True, env=environment)
        try:
            last = _follow(child, progress)
        finally:
            child.kill()
            child.wait()
        if "facts" in last:
            return ModelFacts(**last["facts"])
        fate = last.get("error") or f"{source} could not be converted: {_fate(child.returncode, complaints)}."
        raise ModelError(fate)


def _follow(child: subprocess.Popen[str], progress: Progress) -> dict[str, Any]:
    """Pass the child's steps on until it ends; its last line that is not a step, or {}."""
    last: dict[str, Any] = {}
    for line in child.stdout or ():
        message = json.loads(line)
        if "step" in message:
            progress(Step(*message["step"]))
        else:
            last = message
    child.wait()
    return last


def _fate(status: int, complaints: IO[str]) -> str:
    """Why a child that gave no result ended, in words."""
    if status < 0:
        return f"its process was killed by signal {-status} (9 is most often too little memory)"
    complaints.seek(0)
    lines = complaints.read().strip().splitlines() or [f"its process ended with status {status}"]
    return lines[-1]


def convert(source: Path, target: Path, gguf: str | None, progress: Progress) -> ModelFacts:
    """Load the whole checkpoint in `source` and write it into the empty folder `target`, without a manifest.

    Weights keep the checkpoint's dtype, a GGUF file's become float32. Raises ModelError for what is not a decoder-only
    causal language model, has no safetensors weights, or lacks some of its weights.
    """
    model, tokenizer = _load(source, gguf, progress)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are not quantized any more
    model.config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    if (source / PYTHON_VOCABULARY).exists():
        shutil.copyfile(source / PYTHON_VOCABULARY, target / PYTHON_VOCABULARY)
    progress(Step("Writing the converted weights"))
    tied = _write_weights(model.state_dict(), target / WEIGHTS)
    text = model.config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)  # mpt's name
    return ModelFacts(text.model_type, text.num_hidden_layers, text.hidden_size, text.vocab_size, context, tied)


def _load(source: Path, gguf: str | None, progress: Progress) -> tuple[Any, Any]:
    """The model and its tokenizer, as transformers reads them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": gguf} if gguf else {}
    progress(Step("Reading the tokenizer"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
        progress(Step("Reading the weights"))
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            **where,
            dtype=torch.float32 if gguf else "auto",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        raise ModelError(f"{source} could not be loaded: {' '.join(str(error).split())}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(f"{source} lacks {len(missing)} of its model's tensors, among them {missing[0]}.")
    return model, tokenizer


def _write_weights(state: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Write each tensor once, under the first of its names; the other names, each with the one it is stored under.

    The data begins at a multiple of ALIGNMENT, where torch's own allocations begin: products of float32 weights at
    other addresses round differently (by up to 2e-5), and loading by mapping would not equal loading by copying.
    """
    from safetensors.torch import save_file

    stored: dict[tuple[object, ...], str] = {}
    tied = {}
    for name, tensor in state.items():
        kept = stored.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), name)
        if kept != name:
            tied[name] = kept
    tensors = {name: state[name].contiguous() for name in stored.values()}
    save_file(tensors, path, metadata={"pad": ""})
    begin = data_offset(path)
    if begin % ALIGNMENT:  # the header says where each tensor is, so its length is known only now
        save_file(tensors, path, metadata={"pad": "." * (ALIGNMENT - begin % ALIGNMENT)})
    path.chmod(0o644)  # save_file leaves it to its owner alone; containers share this folder between users
    return tied


def data_offset(path: Path) -> int:
    """Where the data of a safetensors file begins: after the header's length (8 bytes) and the header."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def refuse_unless_causal_lm(config: Path) -> None:
    """Raise ModelError unless `config` (a config.json) is of a decoder-only causal language model of transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        kind, classes = settings.get("model_type"), settings.get("architectures") or []
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{config} cannot be read as a model's config ({error}).") from error
    if kind not in KNOWN:
        raise ModelError(f"{config}: model_type {kind!r} is no causal language model of the installed transformers.")
    if settings.get("is_encoder_decoder"):
        raise ModelError(f"{config}: an encoder-decoder model ({kind}) cannot be split here; use a decoder-only one.")
    if classes and not set(classes) & set(KNOWN.values()):
        raise ModelError(f"{config}: {', '.join(classes)} is no causal language model, so it cannot be used.")


def _report_tqdm(progress: Progress) -> None:
    """Make the bars that transformers and its GGUF reader would draw report here instead.

    Both look up `tqdm.auto.tqdm` when they are imported, so this has to come before; only the child does it.
    """
    tqdm.auto.tqdm = reporting_tqdm(lambda bar: progress(Step(bar.desc.rstrip(".: ") or "Loading", bar.n, bar.total)))


def main() -> int:
    """The child process: convert what the command line names; 0, or 1 after an error line."""
    parser = argparse.ArgumentParser(prog="python -m splitlearn.convert", description="Convert one checkpoint.")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--gguf")
    asked = parser.parse_args()

    def say(**message: object) -> None:
        print(json.dumps(message), flush=True)

    def progress(step: Step) -> None:
        say(step=[step.label, step.done, step.total])

    _report_tqdm(progress)
    try:
        facts = convert(asked.source, asked.target, asked.gguf, progress)
    except ModelError as error:
        say(error=str(error))
        return 1
    say(facts=asdict(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
