"""Turns a checkpoint that transformers can read into the converted folder of checkpoints/folder.py.

`convert` does it in this process; `convert_apart` in a process of its own, so that its peak of memory (twice the model)
goes with it, and reports that process's progress and errors. The child, `python -m splitlearn.checkpoints.convert
SOURCE TARGET [--gguf NAME]`, writes JSON lines: {"step": [label, done, total]}, then {"facts": {...}} or {"error":
"..."}.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import tqdm.auto  # type: ignore[import-untyped]

from splitlearn.checkpoints import chat_template
from splitlearn.checkpoints.adapter import merged
from splitlearn.checkpoints.conformance import (
    not_applied,
    other_shapes,
    refuse_missing,
    refuse_other_tensors,
    refuse_unused,
    some,
    untie,
)
from splitlearn.checkpoints.folder import ALIGNMENT, CONFIG, KERNELS, PYTHON_VOCABULARY, WEIGHTS, ModelFacts
from splitlearn.checkpoints.inspection import adapter_files, model_files, read_json
from splitlearn.errors import ModelError
from splitlearn.runtime.progress import Progress, Step, reporting_tqdm


def convert_apart(source: Path, target: Path, gguf: str | None, progress: Progress) -> ModelFacts:
    """As `convert`, in a child process. Raises ModelError also when the child is killed."""
    command = [sys.executable, "-m", "splitlearn.checkpoints.convert", str(source), str(target)]
    command += ["--gguf", gguf] if gguf else []
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    # Without a GPU, transformers gives weights back in full that are stored in fp8 or mxfp4.
    alone = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "utf-8"}
    environment = os.environ | alone | {"PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryFile("w+") as complaints:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,  # nobody is there to answer a question
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            encoding="utf-8",
            env=environment,
        )
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
        try:
            message = json.loads(line)
        except ValueError:
            continue  # of something that printed before the child took its stdout over
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

    Weights keep the checkpoint's dtype, a GGUF file's become float32. An adapter beside them is merged in. No code of
    the model's own is run. Raises ModelError for what is not a decoder-only causal language model, has no safetensors
    weights, lacks some of its weights or has others than its architecture.
    """
    if gguf:
        _refuse_gguf_adapter(source / gguf)
    with _alone(source, gguf) as seen:
        model, tokenizer = _load(source, seen, gguf, progress)
        if adapter_files(source):
            progress(Step("Merging the adapter into the weights"))
            model = merged(model, source)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are not quantized any more
    untie(model)
    refuse_other_tensors(source, model)
    if odd := [
        name for name in chat_template.templates(tokenizer.chat_template) if not re.fullmatch(r"[\w. -]+", name)
    ]:
        wrong = f"a chat template cannot be called {odd[0]!r}; letters, digits, '_', '-' and '.' can be used"
        raise ModelError(f"{source}: {wrong}.")
    model.config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    if not gguf and (source / PYTHON_VOCABULARY).exists():
        shutil.copyfile(source / PYTHON_VOCABULARY, target / PYTHON_VOCABULARY)
    progress(Step("Writing the converted weights"))
    tied = _write_weights(model.state_dict(), target / WEIGHTS)
    text = model.config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)  # mpt's name
    return ModelFacts(text.model_type, text.num_hidden_layers, text.hidden_size, text.vocab_size, context, tied)


@contextmanager
def _alone(source: Path, gguf: str | None) -> Iterator[Path]:
    """A folder of links to what is loaded, and to nothing else that transformers would find in `source`: an adapter,
    which peft applies later, a second set of weights, Python files."""
    with tempfile.TemporaryDirectory(prefix="splitlearn-") as folder:
        for path in [source / gguf] if gguf else model_files(source):
            link = Path(folder) / path.relative_to(source)
            link.parent.mkdir(exist_ok=True)
            if path == source / CONFIG:
                link.write_text(json.dumps(_without_kernels(read_json(path))), encoding="utf-8")
            else:
                link.symlink_to(path.resolve())
        yield Path(folder)


def _without_kernels(config: dict[str, Any]) -> dict[str, Any]:
    """The config without what it says of how to compute: that may name a package that is not here, or code to be
    downloaded."""
    plain = {key: value for key, value in config.items() if key not in KERNELS}
    return {key: _without_kernels(value) if isinstance(value, dict) else value for key, value in plain.items()}


def _load(source: Path, seen: Path, gguf: str | None, progress: Progress) -> tuple[Any, Any]:
    """The model and its tokenizer, as transformers reads them from `seen`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    what, where = (source / gguf, {"gguf_file": gguf}) if gguf else (source, {})
    progress(Step("Reading the tokenizer"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(seen, **where, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # of transformers, tokenizers and gguf, about files from anywhere
        raise ModelError(f"{what}: the tokenizer could not be read: {_said(source, seen, error)}") from error
    progress(Step("Reading the weights"))
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            seen,
            **where,
            dtype=torch.float32 if gguf else "auto",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            attn_implementation="eager",
            output_loading_info=True,
        )
    except Exception as error:  # as above, and of safetensors
        others = other_shapes(seen) if "ignore_mismatched_sizes" in str(error) else []
        why = f"{some(others)}, which is what {CONFIG} says" if others else _said(source, seen, error)
        raise ModelError(f"{what} could not be loaded: {why}") from error
    refuse_missing(what, report)
    refuse_unused(what, model, report)
    for line in not_applied(source, model, report):
        progress(Step(line))
    return model, tokenizer


def _refuse_gguf_adapter(path: Path) -> None:
    """Raise ModelError for a file that holds an adapter, or a part for images, in the place of a language model."""
    from transformers.integrations.gguf import read_gguf_metadata

    try:
        kind = read_gguf_metadata(str(path))[0].get("general.type", "model")
    except Exception as error:  # numpy and struct, about bytes from anywhere
        raise ModelError(f"{path} cannot be read as a GGUF file, it may be cut short ({error}).") from error
    if kind != "model":
        raise ModelError(f"{path} holds no model but one's {kind} (general.type).")


def _said(source: Path, seen: Path, error: Exception) -> str:
    """One line on why transformers cannot load what is in `source`, and was given to it as `seen`."""
    said = " ".join(str(error).replace(str(seen), str(source)).split()) or type(error).__name__
    said = f"{type(error).__name__}: {said}" if isinstance(error, LookupError | TypeError | AttributeError) else said
    if "trust_remote_code" in said:
        said = "it needs Python code of its own (auto_map), and no code of a model is run here"
    return said[:500]


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

    settings = read_json(config)
    kind, classes = settings.get("model_type"), settings.get("architectures") or []
    if not isinstance(kind, str) or kind not in KNOWN:
        raise ModelError(f"{config}: model_type {kind!r} is no causal language model of the installed transformers.")
    if settings.get("is_encoder_decoder"):
        raise ModelError(f"{config}: an encoder-decoder model ({kind}) cannot be split here; use a decoder-only one.")
    if not isinstance(classes, list) or (classes and not {str(name) for name in classes} & set(KNOWN.values())):
        named = ", ".join(map(str, classes)) if isinstance(classes, list) else repr(classes)
        raise ModelError(f"{config}: {named} is no causal language model, so it cannot be used.")


def _report_tqdm(progress: Progress) -> None:
    """Make the bars that transformers and its GGUF reader would draw report here instead.

    Both look up `tqdm.auto.tqdm` when they are imported, so this has to come before; only the child does it.
    """
    tqdm.auto.tqdm = reporting_tqdm(lambda bar: progress(Step(bar.desc.rstrip(".: ") or "Loading", bar.n, bar.total)))


def main() -> int:
    """The child process: convert what the command line names; 0, or 1 after an error line."""
    parser = argparse.ArgumentParser(
        prog="python -m splitlearn.checkpoints.convert", description="Convert one checkpoint."
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--gguf")
    asked = parser.parse_args()

    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints does not come between

    def say(**message: object) -> None:
        print(json.dumps(message), file=out, flush=True)

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
