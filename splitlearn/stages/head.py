"""The LM head as a stage of its own: maps the hidden states after a model's last layer to logits.

It contains the final norm, the head, and what the causal LM does with the logits (soft-capping, scaling). One token's
logits may be computed in two parts, so that the decode loop can use the first ones early (generation/head_overlap.py).
The parts are rows of the same weights, divided at a boundary of the layer's own kernel.
"""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import linear

from splitlearn.kvcache.layers import reserved
from splitlearn.kvcache.prefix_store import BlockPart
from splitlearn.layers.block_linear import BlockLinear
from splitlearn.layers.onednn_linear import PrepackedLinear
from splitlearn.models.cut import CutModel, forward
from splitlearn.runtime.torch_threads import in_full_float32
from splitlearn.stages import nonfinite
from splitlearn.stages.base import PendingLogits, StageInput, StageOutput, WholePrefix, timed
from splitlearn.stages.engine import StageEngine
from splitlearn.stages.fused_decode import FusedHead, head_of
from splitlearn.stages.settings import SessionSettings

FIRST = 1 / 4
"""The share of the vocabulary in the first part. A smaller part contains the likeliest token too seldom, a larger one
takes too long. 1/6, 1/4, 1/3 and 1/2 contained it for 88, 91, 93 and 97% of tokens (SmolLM2-135M, 20 prompts), with
about the same TPOT."""

Part = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class TorchEngine:
    """Computes logits with torch: `prepare`, then `head`, or `parts` of the head one after the other."""

    prepare: Part
    head: Part
    parts: Sequence[Part]

    by_kernel = False
    """Whether one token's logits are computed without torch, as by `fused_decode.FusedHead`."""

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """The logits [1, T, V] of hidden states [1, T, H]."""
        return self.head(self.prepare(x))

    def in_parts(self, x: torch.Tensor) -> tuple[torch.Tensor, Callable[[], torch.Tensor]] | None:
        """The first logits [1, 1, k] of one token, and a function that computes the others and returns all. None for a
        head without parts."""
        if not self.parts:
            return None
        part, *others = self.parts
        x = self.prepare(x)
        first = part(x)
        return first, lambda: torch.cat([first, *(other(x) for other in others)], dim=-1)


@dataclass(frozen=True)
class HeadSession(WholePrefix):
    """A session's settings. The head keeps nothing between steps. `shares`: its steps can share a product with those of
    other sessions, as they share forwards of the layers."""

    settings: SessionSettings
    shares: bool

    def fork(self, other: "HeadSession", tokens: int) -> None:
        """There is nothing to copy."""

    def close(self) -> None:
        """There is nothing to free."""

    @property
    def most_blocks(self) -> int:
        return sys.maxsize

    def write_blocks(self, parts: Sequence[BlockPart]) -> None:
        """There is nothing to fill."""

    def keep_blocks(self, keys: Sequence[bytes], first: int) -> list[BlockPart]:
        """There is nothing to keep."""
        return [()] * (len(keys) - first)


@dataclass(frozen=True)
class Head:
    """The LM head of a cut without layers. `label` names its time in the time breakdown."""

    eager: StageEngine
    label: str
    dtype: torch.dtype
    engine: TorchEngine | FusedHead

    @property
    def cut(self) -> CutModel:
        return self.eager.cut

    def open(self, settings: SessionSettings, max_length: int) -> HeadSession:
        return HeadSession(settings, shares=settings.new_cache is reserved)

    def size(self, item: StageInput) -> int:
        """How many rows of logits `item` asks for."""
        return item.logits or item.x.shape[1]

    def computes_on_caller(self, item: StageInput) -> bool:
        """Whether the calling thread alone computes `item`."""
        return _alone(item) and self.eager.token_threads == 1

    def step(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        """The logits [1, item.logits, V] of the last positions of each item's hidden states [1, T, H].

        Samples with reserved caches share one product, as they share forwards. Raises NotFinite.
        """
        outputs = self.compute(batch)
        for item, output in zip(batch, outputs, strict=True):
            self.check(item, output)
        return outputs

    def compute(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        """`step` without the check of the outputs."""
        shared = len(batch) > 1 and all(item.session.shares for item in batch)
        groups = [batch] if shared else [[item] for item in batch]
        return [output for group in groups for output in self._together(group)]

    def check(self, item: StageInput, output: StageOutput) -> None:
        """Raise NotFinite if the output for `item` holds NaN or Inf."""
        nonfinite.check(self.cut, self.dtype, item, output.x, partial(self._again, item))

    def logits_in_parts(self, item: StageInput) -> PendingLogits | None:
        """The first logits of one token; `finish()` computes the others. None for a head that cannot be divided.

        None also for the end of a prompt if the head is the kernel's: torch computes that, as in the full model.
        """
        began, alone = time.perf_counter(), _alone(item)
        if self.engine.by_kernel and not alone:
            return None
        with self._settings(item, alone=alone):
            parts = self.engine.in_parts(_last(item).to(self.eager.device))
        if parts is None:
            return None
        first, others = parts
        return PendingLogits(first, timed(self.label, [first], began)[0].timing, partial(self._finish, item, others))

    def _finish(self, item: StageInput, others: Callable[[], torch.Tensor]) -> StageOutput:
        began = time.perf_counter()
        with self._settings(item, alone=_alone(item)):
            out = others()
        output = timed(self.label, [out], began)[0]
        self.check(item, output)
        return output

    def _together(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        began, alone = time.perf_counter(), len(batch) == 1 and _alone(batch[0])
        x = torch.cat([_last(item) for item in batch], dim=1).to(self.eager.device)
        with self._settings(batch[0], alone=alone):
            out = _whole(self.cut, x) if self.engine.by_kernel and not alone else self.engine.whole(x)
        return timed(self.label, torch.split(out, [_last(item).shape[1] for item in batch], dim=1), began)

    def _again(self, item: StageInput) -> torch.Tensor:
        with item.session.settings.gradient_guard():
            return _whole(self.cut, _last(item).to(self.eager.device))

    def _settings(self, item: StageInput, *, alone: bool) -> AbstractContextManager[object]:
        """torch's settings for a step of several tokens, or of one token, which is `alone`."""
        if alone and self.engine.by_kernel:
            return nullcontext()
        settings = ExitStack()
        settings.enter_context(item.session.settings.gradient_guard())
        if alone and self.eager.device.type == "cpu":
            settings.enter_context(in_full_float32(self.eager.token_threads, self.eager.precision))
        return settings


def undivided(engine: StageEngine) -> TorchEngine:
    """The logits by another engine than torch's, always all of them at once."""
    return TorchEngine(_identity, lambda x: engine.compute(StageInput(None, 0, x, logits=0)), ())


def engine_of(cut: CutModel, example: torch.Tensor) -> TorchEngine | FusedHead:
    """The fastest exact engine for the logits of a stage without layers.

    Each candidate is compared with the causal LM's own forward on `example` [1, 1, H]. Norm and head called one after
    the other must give the same bits, in parts as well; the fused kernel may differ by rounding. If the causal LM
    changes the logits after the head, its own forward computes them, once for each part.
    """
    on_cpu, module = example.device.type == "cpu", cast(Any, cut.module)
    if on_cpu and (fused := head_of(cut, FIRST)) is not None:
        return fused
    head = module.get_output_embeddings()
    rows = _parts(head) if on_cpu else ()
    with torch.inference_mode():
        own, direct = _own(cut, rows), TorchEngine(partial(_norm, cut), head, rows)
        expected = own.whole(example)
        engine = direct if _gives(expected, lambda: direct.whole(example)) else own
        in_parts = _gives(expected, lambda: cast(Any, engine.in_parts(example))[1]())
    return engine if in_parts else replace(engine, parts=())


def _own(cut: CutModel, rows: Sequence[Part] = ()) -> TorchEngine:
    """An engine that calls the causal LM's own forward, in parts with those rows of its head."""
    return TorchEngine(_identity, partial(_whole, cut), [partial(_through, cut, _Rows(part)) for part in rows])


def _gives(expected: torch.Tensor, compute: Callable[[], torch.Tensor]) -> bool:
    try:
        return torch.equal(expected, compute())
    except Exception:  # the causal LM may need all logits for what it does with them
        return False


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _alone(item: StageInput) -> bool:
    return item.x.shape[1] == 1


def _last(item: StageInput) -> torch.Tensor:
    return item.x[:, -item.logits :]


def _whole(cut: CutModel, x: torch.Tensor) -> torch.Tensor:
    """The logits by the causal LM's own forward."""
    return forward(cut, x, 0, None)


def _norm(cut: CutModel, x: torch.Tensor) -> torch.Tensor:
    """Apply the modules between the last layer and the head."""
    for path in (cut.structure.norm, *cut.structure.after):
        x = x if path is None else cut.module.get_submodule(path)(x)
    return x


class _Rows(nn.Module):
    """Some rows of the LM head."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self._part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[1, T, H] to [1, T, k]."""
        return self._part(x)


def _through(cut: CutModel, rows: _Rows, x: torch.Tensor) -> torch.Tensor:
    """The logits by the causal LM's own forward, with `rows` as its head."""
    module: Any = cut.module
    head = module.get_output_embeddings()
    module.set_output_embeddings(rows)
    try:
        return _whole(cut, x)
    finally:
        module.set_output_embeddings(head)


def _parts(head: Any) -> Sequence[Part]:
    """The functions for the first logits and for the others. Empty for a head that cannot be divided."""
    if isinstance(head, BlockLinear | PrepackedLinear):
        return cast(tuple[Part, Part] | None, head.parts(FIRST)) or ()
    if type(head) is nn.Linear and (at := int(len(head.weight) * FIRST)):
        return partial(_rows, head, slice(at)), partial(_rows, head, slice(at, None))
    return ()


def _rows(head: nn.Linear, rows: slice, x: torch.Tensor) -> torch.Tensor:
    return linear(x, head.weight[rows], None if head.bias is None else head.bias[rows])
