"""What a trunk server has of one session: the hidden states that it got and those that it sent back.

`capture_of` reads the messages of a session's stream with the code by which a trunk server reads them. A capture is
kept as one safetensors file, whose metadata is JSON.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from google.protobuf.message import DecodeError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from splitlearn.errors import InputError
from splitlearn.models.plan import SplitPlan
from splitlearn.privacy.rotation import turned
from splitlearn.wire import codec
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.hidden_states import Int8Blocks, Plain, Rows

_ROWS: tuple[Rows, ...] = (*(Plain(dtype) for dtype in codec.DTYPES.values()), Int8Blocks())
FORMS: Mapping[str, Rows] = {codec.dtype_name(rows.number): rows for rows in _ROWS}
"""The forms of hidden states on the wire, by their names in the protocol."""
FORMAT = "splitlearn.capture.1"


@dataclass(frozen=True)
class Capture:
    """One session at a trunk server with the layers of `plan`.

    `sent` [T, H] has the hidden state of each position as decoded from the bytes that arrived. `returned` [R, H] has
    those that the trunk sent back, of the first R positions. `prompt_tokens` is the length of the first step, which the
    server sees. `dtype` is that of the client's computation, `form` that of the rows on the wire.
    """

    model: str
    digest: str
    plan: SplitPlan
    dtype: str
    form: str
    prompt_tokens: int
    sent: Tensor
    returned: Tensor

    @property
    def rows(self) -> Rows:
        """The form on the wire."""
        return FORMS[self.form]

    def save(self, path: Path) -> None:
        """Write it to `path`."""
        plan = [self.plan.start, self.plan.end, self.plan.n_layers]
        facts = {"model": self.model, "digest": self.digest, "plan": plan, "dtype": self.dtype, "form": self.form}
        said = json.dumps({"format": FORMAT, **facts, "prompt_tokens": self.prompt_tokens})
        save_file({"sent": self.sent.contiguous(), "returned": self.returned.contiguous()}, path, {"capture": said})

    @classmethod
    def load(cls, path: Path) -> "Capture":
        """Read it from `path`. Raises InputError for a file that is no capture."""
        try:
            with safe_open(path, framework="pt") as file:
                said = json.loads((file.metadata() or {})["capture"])
                found = _of_json(said, file.get_tensor("sent"), file.get_tensor("returned"))
        except Exception as error:  # safetensors does not export its own error classes
            expected = f"a capture that splitlearn wrote ({' '.join(str(error).split())[:200]})"
            raise InputError("capture", str(path), expected) from error
        return found

    def turned(self, q: Tensor) -> "Capture":
        """It with every state times `q` [H, H]."""
        return replace(self, sent=turned(self.sent, q), returned=turned(self.returned, q))

    def shuffled(self, seed: int) -> "Capture":
        """It with the order of the positions shuffled. Attacks that still read it read something else."""
        order = torch.randperm(len(self.sent), generator=torch.Generator().manual_seed(seed))
        back = torch.randperm(len(self.returned), generator=torch.Generator().manual_seed(seed))
        return replace(self, sent=self.sent[order], returned=self.returned[back])


def capture_of(up: Sequence[bytes], down: Sequence[bytes]) -> Capture:
    """The capture of a session whose client sent the messages `up` and whose server answered with `down`.

    Of positions that were sent again, after a truncation, the last state counts. Raises InputError for messages that
    are none of a whole session.
    """
    opening, *steps = _parsed(pb.ClientMessage, up)
    if opening.WhichOneof("kind") != "open" or not steps:
        raise InputError("messages", opening.WhichOneof("kind"), "an Open and at least one step")
    answers = _answers([each.result for each in _parsed(pb.ServerMessage, down) if each.HasField("result")])
    parts = [each.step for each in steps if each.HasField("step")]
    if not parts or parts[0].position:
        expected = "a step from position 0: the session has its whole prompt on this stream"
        raise InputError("position", parts[0].position if parts else None, expected)
    form, size = _form(parts[0].hidden)
    sent, returned = list[Tensor](), list[Tensor]()
    for part in parts:
        _put(sent, part.position, _decoded(part.hidden, form, size))
        for position, answer in answers.pop(part.step_id, ()) if not part.more else ():
            _put(returned, position, _decoded(answer, form, size))
    own = opening.open
    plan = SplitPlan(own.start, own.end, own.n_layers)
    first = sum(part.hidden.shape[1] for part in parts if part.step_id == parts[0].step_id)
    empty = torch.empty(0, size, dtype=sent[0].dtype)
    back = torch.stack(returned) if returned else empty
    return Capture(own.model, own.digest, plan, own.dtype, form, min(first, len(sent)), torch.stack(sent), back)


def _parsed(kind: Any, messages: Sequence[bytes]) -> list[Any]:
    try:
        return [kind.FromString(message) for message in messages] or [kind()]
    except DecodeError as error:
        raise InputError("messages", f"{len(messages)} messages", f"serialized {kind.DESCRIPTOR.full_name}") from error


def _answers(results: Sequence[pb.StepResult]) -> dict[int, list[tuple[int, pb.Tensor]]]:
    """The positions and tensors of the answers to each step. A dropped step has none."""
    found: dict[int, list[tuple[int, pb.Tensor]]] = {}
    for each in results:
        if not each.dropped:
            found.setdefault(each.step_id, []).append((each.position, each.hidden))
    return found


def _form(tensor: pb.Tensor) -> tuple[str, int]:
    """The form and the hidden size of a session's states."""
    name = codec.dtype_name(tensor.dtype)
    if name not in FORMS or len(tensor.shape) != 3:
        raise InputError("tensor.dtype", name, f"one of: {', '.join(FORMS)}, of three dimensions")
    return name, tensor.shape[2]


def _decoded(tensor: pb.Tensor, form: str, size: int) -> Tensor:
    """The rows [T, H] of a message, read as a trunk server reads them."""
    codec.check(tensor, FORMS[form], size)
    return FORMS[form].from_bytes(tensor.data, size)[0]


def _put(rows: list[Tensor], position: int, new: Tensor) -> None:
    """Let `rows` have `new` from `position` on, and nothing behind."""
    if position > len(rows):
        raise InputError("position", position, f"at most {len(rows)}, what came before")
    rows[position:] = list(new)


def _of_json(said: Any, sent: Tensor, returned: Tensor) -> Capture:
    """A checked capture. Raises ValueError, TypeError, KeyError and InputError for what is none."""
    if said["format"] != FORMAT:
        raise ValueError(f"its format is {said['format']}, this program reads {FORMAT}")
    model, digest = str(said["model"]), str(said["digest"])
    form, dtype, first = said["form"], said["dtype"], said["prompt_tokens"]
    if form not in FORMS or dtype not in codec.DTYPES:
        raise ValueError(f"it has no known form {form!r} or dtype {dtype!r}")
    for name, rows in (("sent", sent), ("returned", returned)):
        if rows.dim() != 2 or rows.shape[1] != sent.shape[1] or not rows.isfinite().all():
            raise ValueError(f"{name} has no finite rows of one size")
    if type(first) is not int or not 1 <= first <= len(sent) or len(returned) > len(sent):
        raise ValueError("its numbers of positions contradict each other")
    return Capture(model, digest, SplitPlan(*map(int, said["plan"])), dtype, form, first, sent, returned)
