"""One token through a stage as a CUDA graph: its kernels are captured once, and from then on replayed in one call.

A graph knows addresses only. It reads the token and its position from memory where they are put before each replay.
Keys and values lie where the session's are for which it was captured, so it serves every later session at that place: a
server's pool hands out the same blocks again, and a local stage keeps its pool (stages/local.py). A graph attends to a
window of that memory, masked behind the token's position. Windows double as the context grows, each with a graph of its
own.

Input and output cross in pinned memory, within the graph. A hidden state is on the host after a replay; logits stay on
the device, where the sampler looks for the largest.

At loading, replays are compared with the stage's own forward (stages/verify.py). If they differ, or if the forward asks
the device for a value, the stage is computed by the eager engine.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from weakref import WeakKeyDictionary, WeakSet

import torch
from transformers.cache_utils import Cache, StaticLayer

from splitlearn.kvcache.layers import ReservedCache, ReservedLayer
from splitlearn.kvcache.pool import KVPool, PooledCache
from splitlearn.models.cut import body_of, dtype_of, example, forward
from splitlearn.models.rope import is_pure
from splitlearn.stages.base import StageInput
from splitlearn.stages.engine import Eager, TokenEngine
from splitlearn.stages.verify import reason_against, with_tokens_by

log = logging.getLogger(__name__)
Body = Callable[[], torch.Tensor]
Capture = Callable[[Body], Body]
"""Makes of what computes a tensor what computes it again, into the same memory."""
Graphs = OrderedDict[tuple[int, int], Body]
"""By the address of the first layer's keys and the window."""
LEAST_WINDOW = 256
"""Tokens; memory that is given to sessions one after the other is in blocks of as many."""
MOST_GRAPHS = 64


def of(eager: Eager, capture: Capture | None = None) -> TokenEngine | None:
    """The captured engine of a stage; None, and a warning, where it cannot be captured."""
    cut, captured = eager.cut, None
    if is_pure(cut.module):
        reason: str | None = "the frequencies of its rotary embeddings change as the sequence grows"
    else:
        captured = Captured(eager, capture or on_cuda(eager.device))
        reason = reason_against(cut, with_tokens_by(cut, captured.token))
    if reason is None:
        return captured
    log.warning("The layers [%d, %d) are not captured: %s", cut.start, cut.end, reason)
    return None


def on_cuda(device: torch.device) -> Capture:
    """Captures CUDA graphs. All share their intermediate memory: one is replayed at a time."""
    memory = torch.cuda.graph_pool_handle()

    def capture(body: Body) -> Body:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            torch.cuda.synchronize()
            # Other threads of a server may use the device meanwhile.
            with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
                out = body()

        def replay() -> torch.Tensor:
            with torch.cuda.device(device):
                graph.replay()
            return out

        return replay

    return capture


class Captured:
    """One token after others by a replay, over a cache in a pool, where a later one will lie, too."""

    window = LEAST_WINDOW
    caches: type[Cache] = PooledCache

    def __init__(self, eager: Eager, capture: Capture) -> None:
        self._cut, self._capture, self.compile_s = eager.cut, capture, 0.0
        # Graphs end with the pool for which they were captured: no other memory can come to lie where theirs did.
        self._graphs: WeakKeyDictionary[KVPool, Graphs] = WeakKeyDictionary()
        self._first: Body | None = None
        """The memory that all graphs share is there while one of them is."""
        self._clean: WeakSet[PooledCache] = WeakSet()
        token = example(eager.cut, 1)
        width, dtype = body_of(eager.cut).config.get_text_config().hidden_size, dtype_of(eager.cut)
        self._in = _Crossing(token.shape, token.dtype, eager.device)
        self._position = _Crossing(torch.Size(), torch.long, eager.device)
        self._out = None if eager.cut.last else _Crossing(torch.Size((1, 1, width)), dtype, eager.device)

    def token(self, step: StageInput) -> torch.Tensor:
        """By a replay: the hidden state [1, 1, H] on the host, or the logits [1, 1, V] on the device."""
        cache: PooledCache = step.session.cache
        if cache not in self._clean:
            self._clear(cache, step.position)
        self._in.host.copy_(step.x)
        self._position.host.fill_(step.position)
        out = self._replay(cache, step.position)
        cache.grow(1)
        if self._out is None:
            return out.clone()
        if out.device.type == "cuda":
            torch.cuda.current_stream(out.device).synchronize()
        return self._out.host.clone()

    def _replay(self, cache: PooledCache, position: int) -> torch.Tensor:
        """By the graph for the cache's place and its window, captured if there is none."""
        keys: torch.Tensor = cache.layers[0].keys
        window, graphs = _window(position + 1, keys.shape[2]), self._graphs.setdefault(cache.pool, OrderedDict())
        place = (keys.data_ptr(), window)
        if place not in graphs:
            if len(graphs) >= MOST_GRAPHS:
                graphs.popitem(last=False)
            graphs[place] = self._captured(_Windows(cache, window, self._position.device))
        graphs.move_to_end(place)
        return graphs[place]()

    def _captured(self, windows: Cache) -> Body:
        def body() -> torch.Tensor:
            x, position = self._in.brought(), self._position.brought()
            out = forward(self._cut, x, position, windows, logits_to_keep=1)
            return out if self._out is None else self._out.taken(out)

        body()  # compiles where the stage is compiled, which is counted there
        began = time.perf_counter()
        body()
        graph = self._capture(body)
        self._first = self._first or graph
        self.compile_s += time.perf_counter() - began
        return graph

    def _clear(self, cache: PooledCache, position: int) -> None:
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
