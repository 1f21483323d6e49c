"""What a model, its tokenizer and this machine can do. A child process finds out, so that this one needs no torch."""

from dataclasses import dataclass

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.flags.registry import Place
from splitlearn.runtime import process


@dataclass(frozen=True)
class Question:
    """The model and settings to find out about, as config.yaml names them; `chat` is `generation.chat`."""

    files: ModelFiles
    draft: ModelFiles | None
    device: str
    dtype: str
    chat: bool | str


@dataclass(frozen=True)
class Capabilities:
    """`place` decides which flags can be applied; its device is one that this machine has. `chat_templates` are names.
    `kv_bytes` is what a token takes in the KV cache of each layer, 0 if unknown."""

    place: Place
    chat_templates: tuple[str, ...]
    kv_bytes: tuple[int, ...]


def ask(question: Question) -> Capabilities:
    """The answer of a new child process: seconds. Raises InputError for a device that is not there, a chat template
    that the model does not have and a draft model with another vocabulary, ModelError for a tokenizer or a template
    that cannot be used."""
    found: Capabilities = process.ask(
        "The process that reads the model", "splitlearn.arms.capabilities_main:answer", question
    )
    return found
