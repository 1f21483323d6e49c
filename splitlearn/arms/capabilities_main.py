"""The child process behind `capabilities.ask`: it has torch and transformers."""

from dataclasses import replace
from multiprocessing.connection import Connection

from splitlearn.arms import draft_model
from splitlearn.arms.capabilities import Capabilities, Question
from splitlearn.checkpoints.folder import read_config
from splitlearn.errors import as_error
from splitlearn.flags.here import here
from splitlearn.flags.registry import Place
from splitlearn.generation.tokenizer import Tokens, python_tokenizer_available
from splitlearn.kvcache.architecture import build, kv_values, shapes_of_architecture
from splitlearn.models.structure import no_prefixes, no_truncation
from splitlearn.runtime.device import resolve
from splitlearn.wire.codec import DTYPES


def answer(connection: Connection, question: Question) -> None:
    """Send the capabilities, or the error."""
    try:
        connection.send(_found(question))
    except Exception as error:
        connection.send(as_error(error, "reading the model"))


def _found(question: Question) -> Capabilities:
    files = question.files
    tokens = Tokens.load(files.folder, use_fast=True)
    tokens.check_chat(question.chat, files.name)
    if question.draft is not None:
        draft_model.check_vocabulary(question.draft, files)
    return Capabilities(place_of(question), tokens.chat_templates, _kv_bytes(question))


def _kv_bytes(question: Question) -> tuple[int, ...]:
    """Of each layer; 0 where layers keep something else than keys and values, or more than can be told here."""
    try:
        values = kv_values(shapes_of_architecture(build(read_config(question.files.folder))))
    except Exception:  # whatever a family's own code raises: its full arm may run all the same
        return (0,) * question.files.n_layers
    return tuple(DTYPES[question.dtype].itemsize * count for count in values)


def place_of(question: Question) -> Place:
    """What decides which flags can be applied to the model in question on this machine."""
    folder, config = question.files.folder, read_config(question.files.folder)
    place = replace(
        here(str(resolve(question.device)), question.dtype, config),
        no_python_tokenizer=python_tokenizer_available(folder),
        no_truncation=no_truncation(config),
        no_prefixes=no_prefixes(config),
    )
    if question.draft is None:
        return place
    return replace(place, no_draft=no_truncation(read_config(question.draft.folder)))
