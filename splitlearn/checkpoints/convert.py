"""Turns a checkpoint that transformers can read into the converted folder of checkpoints/folder.py.

`convert` does it in this process. `convert_in_subprocess` does it in a child process, whose peak of memory (twice the
model) ends with it, and reports the child's progress and errors. The child is `python -m splitlearn.checkpoints.convert
SOURCE TARGET [--gguf NAME] [--part JSON]`. It writes JSON lines: {"step": [label, done, total]}, then {"facts": {...}}
or {"error": "..."}.
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
from typing import IO, TYPE_CHECKING, Any

import tqdm.auto  # type: ignore[import-untyped]

from splitlearn.checkpoints import chat_template
from splitlearn.checkpoints.adapter import merged
from splitlearn.checkpoints.configuration import quantization
from splitlearn.checkpoints.conformance import (
    first_few,
    not_applied,
    other_shapes,
    refuse_missing,
    refuse_other_tensors,
    refuse_unused,
    untie,
)
from splitlearn.checkpoints.folder import CONFIG, KERNELS, PYTHON_VOCABULARY, WEIGHTS, ModelFacts
from splitlearn.checkpoints.inspection import adapter_files, model_files, read_json
from splitlearn.checkpoints.weights_file import write_tensors
from splitlearn.errors import ModelError
from splitlearn.models.part import Part
from splitlearn.runtime import programs
from splitlearn.runtime.progress import Progress, Step, reporting_tqdm

if TYPE_CHECKING:
    from splitlearn.checkpoints.gguf_file import GgufModel
    from splitlearn.checkpoints.quantized import QuantizedModel

GENERATION = "generation_config.json"


def convert_in_subprocess(
    source: Path, target: Path, gguf: str | None, progress: Progress, part: Part | None = None
) -> ModelFacts:
    """Run `convert` in a child process. Raises ModelError also if the child is killed."""
    named = ["--gguf", gguf] if gguf else ["--part", json.dumps(asdict(part))] if part else []
    command = programs.command("splitlearn.checkpoints.convert", str(source), str(target), *named)
    # Without a GPU, transformers converts fp8 and mxfp4 weights back to floating point.
    alone = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "utf-8"}
    with tempfile.TemporaryFile("w+") as complaints:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,  # nobody is there to answer a question
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            encoding="utf-8",
            env=programs.environment() | alone,
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
    """Report the child's steps until it ends. Return its last message that is not a step, or {}."""
    last: dict[str, Any] = {}
    for line in child.stdout or ():
        try:
            message = json.loads(line)
        except ValueError:
            continue  # printed before the child took over its stdout
        if "step" in message:
            progress(Step(*message["step"]))
        else:
            last = message
    child.wait()
    return last


def _fate(status: int, complaints: IO[str]) -> str:
    """Why a child without a result ended, as a sentence."""
    if status < 0:
        return f"its process was killed by signal {-status} (9 is most often too little memory)"
    complaints.seek(0)
    lines = complaints.read().strip().splitlines() or [f"its process ended with status {status}"]
    return lines[-1]


def convert(source: Path, target: Path, gguf: str | None, progress: Progress, part: Part | None = None) -> ModelFacts:
    """Load the checkpoint in `source`, or a `part` of it, and write it into the empty folder `target`, without a
    manifest.

    Weights keep the checkpoint's dtype; those of a GGUF file, of GPTQ and of AWQ become float32. An adapter beside them
    is merged. No code of the model is run. Raises ModelError unless it is a decoder-only causal language model with
    safetensors weights, exactly those of its architecture.
    """
    if gguf:
        _refuse_gguf_adapter(source / gguf)
    with _links_to(source, gguf) as links:
        tokenizer = _tokenizer(source, links, gguf, progress)
        streamed = _streamed(source, links, gguf) if gguf else _quantized(source, links, progress)
        if streamed is not None:
            model, state = streamed.model, {}
        elif part is None:
            model = _whole(source, links, gguf, progress)
            state = model.state_dict()
        else:
            model, state = _part_of(source, links, part, progress)
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
    if streamed is not None:
        tied = streamed.write(target / WEIGHTS, progress)
    else:
        progress(Step("Writing the converted weights"))
        tied = _write_weights(state, target / WEIGHTS)
    text = model.config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)  # mpt's name
    return ModelFacts(text.model_type, text.num_hidden_layers, text.hidden_size, text.vocab_size, context, tied)


@contextmanager
def _links_to(source: Path, gguf: str | None) -> Iterator[Path]:
    """A folder of links to the files that are loaded.

    transformers would also find others in `source`: an adapter, which peft applies later, a second set of weights,
    Python files.
    """
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
    """The config without the keys that choose kernels: they may name a missing package, or code to download."""
    plain = {key: value for key, value in config.items() if key not in KERNELS}
    return {key: _without_kernels(value) if isinstance(value, dict) else value for key, value in plain.items()}


def _tokenizer(source: Path, links: Path, gguf: str | None, progress: Progress) -> Any:
    """The model's tokenizer, read by transformers from the folder `links`."""
    from transformers import AutoTokenizer

    what, where = (source / gguf, {"gguf_file": gguf}) if gguf else (source, {})
    progress(Step("Reading the tokenizer"))
    try:
        return AutoTokenizer.from_pretrained(links, **where, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # from transformers, tokenizers and gguf, about arbitrary files
        raise ModelError(f"{what}: the tokenizer could not be read: {_reason(source, links, error)}") from error


def _model(source: Path, links: Path, gguf: str | None, progress: Progress) -> Any:
    """The model, read by transformers from the folder `links`."""
    import torch
    from transformers import AutoModelForCausalLM

    what, where = (source / gguf, {"gguf_file": gguf}) if gguf else (source, {})
    progress(Step("Reading the weights"))
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            links,
            **where,
            dtype=torch.float32 if gguf else "auto",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            attn_implementation="eager",
            output_loading_info=True,
        )
    except Exception as error:  # as above, and of safetensors
        others = other_shapes(links) if "ignore_mismatched_sizes" in str(error) else []
        why = f"{first_few(others)}, which is what {CONFIG} says" if others else _reason(source, links, error)
        raise ModelError(f"{what} could not be loaded: {why}") from error
    refuse_missing(what, report)
    refuse_unused(what, model, report)
    for line in not_applied(source, model, report):
        progress(Step(line))
    return model


def _streamed(source: Path, links: Path, gguf: str) -> "GgufModel | QuantizedModel | None":
    """The model of a GGUF file whose tensors can be converted one after the other, or None."""
    from splitlearn.checkpoints import gguf_file  # imports torch

    try:
        found = gguf_file.open_file(source / gguf)
    except Exception as error:  # from transformers and gguf, about an arbitrary file
        raise ModelError(f"{source / gguf} could not be loaded: {_reason(source, links, error)}") from error
    return found


def _quantized(source: Path, links: Path, progress: Progress) -> "QuantizedModel | None":
    """The model in the folder `links` if its weights are quantized in a way that is converted here, or None."""
    from splitlearn.checkpoints import quantized  # imports torch

    if (how := quantization(source / CONFIG)) is None:
        return None
    if adapters := adapter_files(source):
        raise ModelError(f"{source}: {adapters[0].name} cannot be merged into weights that are quantized.")
    try:
        found = quantized.open_folder(links, how)
        _set_generation(found.model, links)
    except ModelError as error:
        raise ModelError(str(error).replace(str(links), str(source))) from error
    except Exception as error:  # from transformers, about an arbitrary folder
        raise ModelError(f"{source} could not be loaded: {_reason(source, links, error)}") from error
    for line in not_applied(source, found.model, {"unexpected_keys": found.unused}):
        progress(Step(line))
    return found


def _whole(source: Path, links: Path, gguf: str | None, progress: Progress) -> Any:
    """The model with all of its weights in floating point, and with the adapter that is beside it."""
    model = _model(source, links, gguf, progress)
    if adapter_files(source):
        progress(Step("Merging the adapter into the weights"))
        model = merged(model, source)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are not quantized any more
    untie(model)
    refuse_other_tensors(source, model)
    return model


def _part_of(source: Path, links: Path, part: Part, progress: Progress) -> tuple[Any, dict[str, Any]]:
    """The model with the tensors of `part` alone, and these, read from the folder `links`."""
    from splitlearn.checkpoints import shards  # imports torch

    progress(Step(f"Reading {part}"))
    try:
        model, state, unused = shards.load(links, part)
        _set_generation(model, links)
    except ModelError as error:
        raise ModelError(str(error).replace(str(links), str(source))) from error
    except Exception as error:  # from transformers, about an arbitrary file
        raise ModelError(f"{source / GENERATION} cannot be used: {_reason(source, links, error)}") from error
    for line in not_applied(source, model, {"unexpected_keys": unused}):
        progress(Step(line))
    return model, state


def _set_generation(model: Any, folder: Path) -> None:
    """Give `model` the generation_config.json of `folder`, if there is one."""
    from transformers import GenerationConfig

    if (folder / GENERATION).exists():
        model.generation_config = GenerationConfig.from_dict(read_json(folder / GENERATION))


def _refuse_gguf_adapter(path: Path) -> None:
    """Raise ModelError for a file with an adapter or a part for images instead of a language model."""
    from transformers.integrations.gguf import read_gguf_metadata

    try:
        kind = read_gguf_metadata(str(path))[0].get("general.type", "model")
    except Exception as error:  # from numpy and struct, about arbitrary bytes
        raise ModelError(f"{path} cannot be read as a GGUF file, it may be cut short ({error}).") from error
    if kind != "model":
        raise ModelError(f"{path} holds no model but one's {kind} (general.type).")


def _reason(source: Path, links: Path, error: Exception) -> str:
    """One line on why transformers cannot load `source`, which it read from the folder `links`."""
    reason = " ".join(str(error).replace(str(links), str(source)).split()) or type(error).__name__
    reason = (
        f"{type(error).__name__}: {reason}" if isinstance(error, LookupError | TypeError | AttributeError) else reason
    )
    if "trust_remote_code" in reason:
        reason = "it needs Python code of its own (auto_map), and no code of a model is run here"
    return reason[:500]


def _write_weights(state: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Write each tensor once, under its first name. Return its other names, each with that first one."""
    stored: dict[tuple[object, ...], str] = {}
    tied = {}
    for name, tensor in state.items():
        first = stored.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), name)
        if first != name:
            tied[name] = first
    write_tensors({name: state[name].contiguous() for name in stored.values()}, path)
    return tied


def _report_tqdm(progress: Progress) -> None:
    """Make the progress bars of transformers and its GGUF reader call `progress`.

    Both look up `tqdm.auto.tqdm` on import, so call this first. Only the child does.
    """
    tqdm.auto.tqdm = reporting_tqdm(lambda bar: progress(Step(bar.desc.rstrip(".: ") or "Loading", bar.n, bar.total)))


def main() -> int:
    """The child process: convert what the command line names. Returns 0, or 1 after an error line."""
    parser = argparse.ArgumentParser(
        prog="python -m splitlearn.checkpoints.convert", description="Convert one checkpoint."
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--gguf")
    parser.add_argument("--part", type=lambda text: Part.read(json.loads(text)))
    arguments = parser.parse_args()

    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # keeps the output of libraries out of the JSON lines

    def say(**message: object) -> None:
        print(json.dumps(message), file=out, flush=True)

    def progress(step: Step) -> None:
        say(step=[step.label, step.done, step.total])

    _report_tqdm(progress)
    try:
        facts = convert(arguments.source, arguments.target, arguments.gguf, progress, arguments.part)
    except ModelError as error:
        say(error=str(error))
        return 1
    say(facts=asdict(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
