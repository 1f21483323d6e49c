"""One token through a stage as a CUDA graph: its kernels are recorded once, and from then on replayed in one call.

A recording knows nothing but addresses. The token and its position it reads from memory where they are put before each
replay; keys and values lie where the session's are for which it was made, so that it serves every later session at that
place: a trunk's pool hands out the same blocks again, and a local stage keeps its memory (stages/local.py). It attends
to a window of that memory, masked behind the token's position. Windows double as the context grows, each with a
recording of its own.

What goes in and out crosses in pinned memory, within the recording: a hidden state is on the host after a replay, while
logits stay on the device, where the sampler looks for the largest.

At loading, replays are compared with the stage's own forward (stages/verify.py). If they differ, or if the forward asks
the device for a value, the stage keeps its forward.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import cast
from weakref import WeakSet

import torch
from transformers.cache_utils import Cache, StaticLayer

from splitlearn.kvcache.layers import ReservedCache, ReservedLayer
from splitlearn.models.cut import CutModel, body_of, example, forward
from splitlearn.models.rope import is_pure
from splitlearn.stages.fused_decode import Row
from splitlearn.stages.verify import reason_against, with_tokens_by

log = logging.getLogger(__name__)
Body = Callable[[], torch.Tensor]
Record = Callable[[Body], Body]
"""Makes of what computes a tensor what computes it again, into the same memory."""
LEAST_WINDOW = 256
"""Tokens; memory that is given to sessions one after the other is in blocks of as many."""
MOST_RECORDINGS = 64


def of(cut: CutModel, record: Record | None = None) -> Row | None:
    """What replays one token through the stage; None, and a warning, where it cannot be recorded."""
    reason, row = None, None
    if is_pure(cut.module):
        reason = "the frequencies of its rotary embeddings change as the sequence grows"
    else:
        row = GraphRow(cut, record or on_cuda(example(cut, 1).device))
        by_row = with_tokens_by(cut, lambda step: cast(torch.Tensor, row(step.x, step.position, step.cache)))
        reason = reason_against(cut, by_row)
    if reason is None and row is not None:
        row.end_trial()
        return row
    log.warning("The layers [%d, %d) are not recorded: %s", cut.start, cut.end, reason)
    return None


def on_cuda(device: torch.device) -> Record:
    """Recordings by CUDA. All share their intermediate memory: one is replayed at a time."""
    memory = torch.cuda.graph_pool_handle()

    def record(body: Body) -> Body:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            torch.cuda.synchronize()
            # Other threads of a trunk may use the device meanwhile.
            with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
                out = body()

        def replay() -> torch.Tensor:
            with torch.cuda.device(device):
                graph.replay()
            return out

        return replay

    return record


class GraphRow:
    """Of one token id [1, 1] or hidden state [1, 1, H] what the stage's own forward would make, by a replay; None for a
    session whose keys and values have no place in memory."""

    recorded = True

    def __init__(self, cut: CutModel, record: Record) -> None:
        self.compile_s = 0.0
        self._first: dict[tuple[int, int], tuple[Cache, Body]] = {}
        """Those of the trial. The memory that all recordings share is there while one of them is."""
        self._cut, self._record = cut, record
        # The windows stay with what was recorded for them: no other memory can come to lie where they do.
        self._recordings: OrderedDict[tuple[int, int], tuple[Cache, Body]] = OrderedDict()
        self._clean: WeakSet[ReservedCache] = WeakSet()
        token = example(cut, 1)
        device = token.device
        width, self._dtype = body_of(cut).config.get_text_config().hidden_size, next(cut.module.parameters()).dtype
        self._in = _Crossing(token.shape, token.dtype, device)
        self._position = _Crossing(torch.Size(), torch.long, device)
        self._out = None if cut.last else _Crossing(torch.Size((1, 1, width)), self._dtype, device)

    def __call__(
        self,
        x: torch.Tensor,
        position: int,
        cache: Cache | None,
        unwanted: Callable[[], bool] | None = None,
    ) -> torch.Tensor | None:
        """The hidden state [1, 1, H] on the host, or the logits [1, 1, V] on the device; the cache has the token."""
        if not isinstance(cache, ReservedCache) or x.shape[1] != 1 or not cache.layers[0].is_initialized:
            return None
        if cache not in self._clean:
            self._clear(cache, position)
        self._in.host.copy_(x)
        self._position.host.fill_(position)
        out = self._replay(cache, position)
        cache.grow(1)
        if self._out is None:
            return out.clone()
        if out.device.type == "cuda":
            torch.cuda.current_stream(out.device).synchronize()
        return self._out.host.clone()

    def end_trial(self) -> None:
        """Begin anew, as if no session had come yet."""
        self._first, self.compile_s = dict(self._recordings), 0.0
        self.forget()

    def forget(self) -> None:
        """Drop all recordings, and with them the memory for which they were made."""
        self._recordings.clear()

    def _replay(self, cache: ReservedCache, position: int) -> torch.Tensor:
        """The recording for the cache's place and its window, made if there is none."""
        keys: torch.Tensor = cache.layers[0].keys
        window = _window(position + 1, keys.shape[2])
        place = (keys.data_ptr(), window)
        if place not in self._recordings:
            if len(self._recordings) >= MOST_RECORDINGS:
                self._recordings.popitem(last=False)
            windows = _Windows(cache, window, self._position.device)
            self._recordings[place] = windows, self._recorded(windows)
        self._recordings.move_to_end(place)
        return self._recordings[place][1]()

    def _recorded(self, windows: Cache) -> Body:
        def body() -> torch.Tensor:
            x, position = self._in.brought(), self._position.brought()
            out = forward(self._cut, x, position, windows, logits_to_keep=1)
            return out if self._out is None else self._out.taken(out)

        body()  # compiles where the stage is compiled, which is counted there
        began = time.perf_counter()
        body()
        recorded = self._record(body)
        self.compile_s += time.perf_counter() - began
        return recorded

    def _clear(self, cache: ReservedCache, position: int) -> None:
        """What is masked is multiplied by 0, and must be a number: memory that nobody wrote, or another session's."""
        for layer in cache.layers:
            layer.keys[:, :, position:].zero_()
            layer.values[:, :, position:].zero_()
        self._clean.add(cache)


class _Crossing:
    """A tensor on the device and its like on the host, in pinned memory where the device is CUDA's."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self.device = torch.zeros(shape, dtype=dtype, device=device)
        self.host = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")

    def brought(self) -> torch.Tensor:
        """The device's tensor, with the host's values."""
        return self.device.copy_(self.host, non_blocking=True)

    def taken(self, out: torch.Tensor) -> torch.Tensor:
        """`out`, whose values the host's tensor gets."""
        self.host.copy_(out, non_blocking=True)
        return out


class _Windows(Cache):  # type: ignore[misc]
    """The first `window` tokens of a reserved cache's memory, as layers of static shape whose length is a tensor."""

    def __init__(self, cache: ReservedCache, window: int, position: torch.Tensor) -> None:
        super().__init__(layers=[_Window(layer, window, position) for layer in cache.layers])


class _Window(StaticLayer):  # type: ignore[misc]
    """transformers' static layer over memory that is there, at a position that all layers share."""

    def __init__(self, layer: ReservedLayer, window: int, position: torch.Tensor) -> None:
        super().__init__(window)
        self.keys, self.values = layer.keys[:, :, :window], layer.values[:, :, :window]
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.cumulative_length, self.is_initialized = position, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token at the position."""
        at = self.cumulative_length.view(1)
        self.keys.index_copy_(2, at, key_states)
        self.values.index_copy_(2, at, value_states)
        return self.keys, self.values


def _window(tokens: int, room: int) -> int:
    """The least window for `tokens`: a power of two from LEAST_WINDOW on, or all the room that there is."""
    return min(room, max(LEAST_WINDOW, 1 << (tokens - 1).bit_length()))
