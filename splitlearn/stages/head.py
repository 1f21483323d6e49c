"""The LM head as a stage of its own: the hidden states after a model's last layer to logits.

Its stage has no layers: the final norm, the head and what the causal LM does with the logits (soft-capping, scaling).
One token's logits may be computed in two parts, so that the decode loop can do something with the first ones before the
others are there (generation/head_overlap.py). The parts are rows of the same weights, cut where the layer's own kernel
goes from one piece to the next.
"""

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
from splitlearn.layers.block_linear import BlockLinear
from splitlearn.layers.onednn_linear import PrepackedLinear
from splitlearn.models.cut import CutModel, forward
from splitlearn.runtime.torch_threads import computing_one_token
from splitlearn.stages import nonfinite
from splitlearn.stages.base import PendingLogits, StageInput, StageOutput, timed
from splitlearn.stages.engine import Eager
from splitlearn.stages.fused_decode import FusedHead, head_of
from splitlearn.stages.settings import SessionSettings

FIRST = 1 / 4
"""The share of the vocabulary in the first part. Less has the likeliest token too seldom, more takes too long: of 1/6,
1/4, 1/3 and 1/2 it was 88, 91, 93 and 97% of tokens (SmolLM2-135M, 20 prompts), and TPOT was about the same."""

Part = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class TorchEngine:
    """Computes logits with torch: `head` of what `prepare` makes of hidden states, or in `parts`."""

    prepare: Part
    head: Part
    parts: Sequence[Part]

    by_kernel = False
    """Whether one token's logits are computed without torch, as by `fused_decode.FusedHead`."""

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """The logits [1, T, V] of hidden states [1, T, H]."""
        return self.head(self.prepare(x))

    def in_parts(self, x: torch.Tensor) -> tuple[torch.Tensor, Callable[[], torch.Tensor]] | None:
        """Of one token the first logits [1, 1, k], and what computes the others and gives all; None if it cannot."""
        if not self.parts:
            return None
        part, *others = self.parts
        x = self.prepare(x)
        first = part(x)
        return first, lambda: torch.cat([first, *(other(x) for other in others)], dim=-1)


@dataclass(frozen=True)
class HeadSession:
    """A session's flags: the head keeps nothing from step to step."""

    settings: SessionSettings

    def fork(self, other: "HeadSession", tokens: int) -> None:
        """Nothing is to be copied."""

    def close(self) -> None:
        """Nothing is to be freed."""


@dataclass(frozen=True)
class Head:
    """The LM head of a cut without layers. `word` is the time breakdown's name for its time."""

    eager: Eager
    word: str
    dtype: torch.dtype
    engine: TorchEngine | FusedHead

    @property
    def cut(self) -> CutModel:
        return self.eager.cut

    def open(self, settings: SessionSettings, max_length: int) -> HeadSession:
        return HeadSession(settings)

    def step(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        """The logits [1, item.logits, V] of the last positions of each item's hidden states [1, T, H].

        Samples whose caches are reserved share one product, as they share forwards. Raises NotFinite.
        """
        shared = len(batch) > 1 and all(item.session.settings.new_cache is reserved for item in batch)
        groups = [batch] if shared else [[item] for item in batch]
        return [output for group in groups for output in self._together(group)]

    def logits_in_parts(self, item: StageInput) -> PendingLogits | None:
        """The first logits of one token, and what computes the others; None for a head that cannot be parted.

        Nor does the kernel part a prompt's: what a prompt ends in is torch's, as in the full model.
        """
        began, alone = time.perf_counter(), _alone(item)
        if self.engine.by_kernel and not alone:
            return None
        with self._settings(item, alone=alone):
            parts = self.engine.in_parts(_last(item).to(self.eager.device))
        if parts is None:
            return None
        first, others = parts
        return PendingLogits(first, timed(self.word, [first], began)[0].timing, partial(self._finish, item, others))

    def _finish(self, item: StageInput, others: Callable[[], torch.Tensor]) -> StageOutput:
        began = time.perf_counter()
        with self._settings(item, alone=_alone(item)):
            out = others()
        return self._outputs([item], [out], began)[0]

    def _together(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        began, alone = time.perf_counter(), len(batch) == 1 and _alone(batch[0])
        x = torch.cat([_last(item) for item in batch], dim=1).to(self.eager.device)
        with self._settings(batch[0], alone=alone):
            out = _whole(self.cut, x) if self.engine.by_kernel and not alone else self.engine.whole(x)
        return self._outputs(batch, torch.split(out, [_last(item).shape[1] for item in batch], dim=1), began)

    def _outputs(self, batch: Sequence[StageInput], outs: Sequence[torch.Tensor], began: float) -> list[StageOutput]:
        outputs = timed(self.word, outs, began)
        for item, output in zip(batch, outputs, strict=True):
            nonfinite.check(self.cut, self.dtype, item, output.x, partial(self._again, item))
        return outputs

    def _again(self, item: StageInput) -> torch.Tensor:
        with item.session.settings.gradient_guard():
            return _whole(self.cut, _last(item).to(self.eager.device))

    def _settings(self, item: StageInput, *, alone: bool) -> AbstractContextManager[object]:
        """Torch's settings for a step of one token, which is `alone`, or of several."""
        if alone and self.engine.by_kernel:
            return nullcontext()
        settings = ExitStack()
        settings.enter_context(item.session.settings.gradient_guard())
        if alone and self.eager.device.type == "cpu":
            settings.enter_context(computing_one_token(self.eager.token_threads, self.eager.precision))
        return settings


def engine_of(cut: CutModel, example: torch.Tensor) -> TorchEngine | FusedHead:
    """The fastest exact way to compute the logits of such a stage without layers.

    Each is first held against the causal LM's own forward, on `example` [1, 1, H]: norm and head called one after the
    other, and the head in parts, must give the same bits, the fused kernel the same but for rounding. Where the causal
    LM does something with the logits, its own forward computes them, once for each part.
    """
    on_cpu, module = example.device.type == "cpu", cast(Any, cut.module)
    if on_cpu and (fused := head_of(cut, FIRST)) is not None:
        return fused
    head = module.get_output_embeddings()
    rows = _parts(head) if on_cpu else ()
    with torch.inference_mode():
        own, direct = _own(cut, rows), TorchEngine(partial(_norm, cut), head, rows)
        wanted = own.whole(example)
        engine = direct if _gives(wanted, lambda: direct.whole(example)) else own
        in_parts = _gives(wanted, lambda: cast(Any, engine.in_parts(example))[1]())
    return engine if in_parts else replace(engine, parts=())


def _own(cut: CutModel, rows: Sequence[Part] = ()) -> TorchEngine:
    """The causal LM's own forward, in parts with those rows of its head."""
    return TorchEngine(_as_it_is, partial(_whole, cut), [partial(_through, cut, _Rows(part)) for part in rows])


def _gives(wanted: torch.Tensor, compute: Callable[[], torch.Tensor]) -> bool:
    try:
        return torch.equal(wanted, compute())
    except Exception:  # what the causal LM does with its logits may need all of them
        return False


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def _alone(item: StageInput) -> bool:
    return item.x.shape[1] == 1


def _last(item: StageInput) -> torch.Tensor:
    return item.x[:, -item.logits :]


def _whole(cut: CutModel, x: torch.Tensor) -> torch.Tensor:
    """By the causal LM's own forward."""
    return forward(cut, x, 0, None)


def _norm(cut: CutModel, x: torch.Tensor) -> torch.Tensor:
    """What comes between the layers and the head within the body."""
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
    """By the causal LM's own forward, with `rows` as its head."""
    module: Any = cut.module
    head = module.get_output_embeddings()
    module.set_output_embeddings(rows)
    try:
        return _whole(cut, x)
    finally:
        module.set_output_embeddings(head)


def _parts(head: Any) -> Sequence[Part]:
    """What gives the first logits, and the others; nothing for a head of another kind or one in one piece."""
    if isinstance(head, BlockLinear | PrepackedLinear):
        return cast(tuple[Part, Part] | None, head.parts(FIRST)) or ()
    if type(head) is nn.Linear and (at := int(len(head.weight) * FIRST)):
        return partial(_rows, head, slice(at)), partial(_rows, head, slice(at, None))
    return ()


def _rows(head: nn.Linear, rows: slice, x: torch.Tensor) -> torch.Tensor:
    return linear(x, head.weight[rows], None if head.bias is None else head.bias[rows])
