"""The LM head as a stage of its own: the hidden states after a model's last layer to logits.

Its stage has no layers: the final norm, the head and what the causal LM does with the logits (soft-capping, scaling).
One token's logits may be computed in two parts, so that the decode loop can do something with the first ones before the
others are there (generation/head_overlap.py). The parts are rows of the same weights, cut where the layer's own kernel
goes from one piece to the next.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import linear

from splitlearn.errors import NotFinite
from splitlearn.events import StageTiming
from splitlearn.kvcache.layers import reserved
from splitlearn.layers.block_linear import BlockLinear
from splitlearn.layers.onednn_linear import PrepackedLinear
from splitlearn.models.cut import CutModel, forward
from splitlearn.runtime.torch_threads import computing_one_token
from splitlearn.stages import fused_decode, nonfinite
from splitlearn.stages.base import PendingLogits, StageInput, StageOutput
from splitlearn.stages.settings import SessionSettings

FIRST = 1 / 4
"""The share of the vocabulary in the first part. Less has the likeliest token too seldom, more takes too long: of 1/6,
1/4, 1/3 and 1/2 it was 88, 91, 93 and 97% of tokens (SmolLM2-135M, 20 prompts), and TPOT was about the same."""

Part = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class HeadEngine:
    """What computes logits. `prepare` makes of hidden states [1, T, H] what `whole` makes the logits [1, T, V] of, and
    each of `parts` some of them for one token."""

    prepare: Part
    whole: Part
    parts: Sequence[Part]


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
    """The LM head of a cut without layers. `word` is the time breakdown's name for its time; one token is computed by
    `threads` threads, and `precision` is the process's own float32_matmul_precision."""

    cut: CutModel
    word: str
    device: torch.device
    dtype: torch.dtype
    threads: int
    precision: str
    engine: HeadEngine

    def open(self, settings: SessionSettings, max_length: int) -> HeadSession:
        """A session, which holds no memory."""
        return HeadSession(settings)

    def step(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        """The logits [1, item.logits, V] of the last positions of each item's hidden states [1, T, H].

        Samples whose caches are reserved share one product, as they share forwards. Raises NotFinite.
        """
        if len(batch) == 1 or any(item.session.settings.new_cache is not reserved for item in batch):
            return [self._step(item) for item in batch]
        began, sizes = time.perf_counter(), [item.logits for item in batch]
        out = self._computed(self._whole, torch.cat([_last(item) for item in batch], dim=1), batch[0])
        timings = [self._timing(out, began), *(StageTiming({}) for _ in batch[1:])]
        outputs = [StageOutput(own, each) for own, each in zip(torch.split(out, sizes, dim=1), timings, strict=True)]
        for item, output in zip(batch, outputs, strict=True):
            self._check(item, output.x)
        return outputs

    def logits_in_parts(self, item: StageInput) -> PendingLogits | None:
        """The first logits of one token, and what computes the others; None for a head that cannot be parted."""
        if len(self.engine.parts) < 2:
            return None
        began, (first_part, *others) = time.perf_counter(), self.engine.parts
        x = self._computed(self.engine.prepare, _last(item), item)
        first = self._computed(first_part, x, item)
        return PendingLogits(first, self._timing(first, began), partial(self._finish, item, x, first, others))

    def _finish(self, item: StageInput, x: torch.Tensor, first: torch.Tensor, others: Sequence[Part]) -> StageOutput:
        began = time.perf_counter()
        out = torch.cat([first, *(self._computed(part, x, item) for part in others)], dim=-1)
        timing = self._timing(out, began)
        self._check(item, out)
        return StageOutput(out, timing)

    def _step(self, item: StageInput) -> StageOutput:
        began = time.perf_counter()
        out = self._computed(self._whole, _last(item), item)
        timing = self._timing(out, began)
        self._check(item, out)
        return StageOutput(out, timing)

    def _whole(self, x: torch.Tensor) -> torch.Tensor:
        return self.engine.whole(self.engine.prepare(x))

    def _computed(self, function: Part, x: torch.Tensor, item: StageInput) -> torch.Tensor:
        alone = x.shape[1] == 1 and self.device.type == "cpu"
        with (
            item.session.settings.gradient_guard(),
            computing_one_token(self.threads, self.precision) if alone else nullcontext(),
        ):
            return function(x.to(self.device))

    def _timing(self, out: torch.Tensor, began: float) -> StageTiming:
        if out.device.type != "cpu":
            torch.accelerator.synchronize(out.device)
        return StageTiming({self.word: time.perf_counter() - began})

    def _check(self, item: StageInput, logits: torch.Tensor) -> None:
        """Raise NotFinite that names where it began if the logits of `item` cannot be sampled from."""
        wrong = nonfinite.wrong_place(logits, logits=True)
        if wrong is None:
            return
        row, value = wrong
        position, again = item.position + item.x.shape[1] - item.logits + row, partial(_whole, self.cut)
        raise NotFinite(
            nonfinite.told(self.cut, value, position, self.dtype, lambda: self._computed(again, _last(item), item))
        )


def engine_of(cut: CutModel, example: torch.Tensor) -> HeadEngine:
    """The fastest exact way to compute the logits of such a stage without layers.

    Each is first held against the causal LM's own forward, on `example` [1, 1, H]: norm and head called one after the
    other, and the head in parts, must give the same bits, the fused kernel the same but for rounding. Where the causal
    LM does something with the logits, its own forward computes them, once for each part.
    """
    module: Any = cut.module
    head = module.get_output_embeddings()
    if example.device.type == "cpu" and (fused := fused_decode.head_of(cut, FIRST)) is not None:
        return HeadEngine(_as_it_is, partial(_one_row, fused[0], partial(_whole, cut)), fused[1:])
    rows = _parts(head) if example.device.type == "cpu" else ()
    direct = HeadEngine(partial(_norm, cut), head, rows)
    through = HeadEngine(_as_it_is, partial(_whole, cut), [partial(_through, cut, _Rows(part)) for part in rows])
    with torch.inference_mode():
        wanted = _whole(cut, example)
        engine = direct if _gives(wanted, lambda: head(_norm(cut, example))) else through
        x = engine.prepare(example)
        in_parts = bool(rows) and _gives(wanted, lambda: torch.cat([part(x) for part in engine.parts], dim=-1))
    return engine if in_parts else replace(engine, parts=())


def _gives(wanted: torch.Tensor, compute: Callable[[], torch.Tensor]) -> bool:
    try:
        return torch.equal(wanted, compute())
    except Exception:  # what the causal LM does with its logits may need all of them
        return False


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def _last(item: StageInput) -> torch.Tensor:
    return item.x[:, -item.logits :]


def _one_row(fused: Part, whole: Part, x: torch.Tensor) -> torch.Tensor:
    return fused(x) if x.shape[1] == 1 else whole(x)


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
