"""Decodes one token of a stage by a CUDA graph: captures its kernels once, then replays them in one call.

A graph contains fixed addresses. The token and its position are written to fixed memory before each replay. Keys and
values are those of the session for which the graph was captured. So the graph serves every later session with the same
addresses: a server's pool reuses its blocks, and a local stage keeps its pool (stages/local.py). A graph attends to a
window of that memory, masked behind the token's position. Windows double as the context grows, and each has a graph of
its own.

Input and output are copied through pinned memory, within the graph. After a replay a hidden state is on the host.
Logits stay on the device, where the sampler looks for the largest.

At loading, replays are compared with the stage's own forward (stages/verify.py). If they differ, or if the forward
reads a value from the device, the eager engine computes the stage.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from weakref import WeakKeyDictionary, WeakSet

import torch
from transformers.cache_utils import Cache, StaticLayer

from splitlearn.kvcache.layers import ReservedLayer
from splitlearn.kvcache.pool import KVPool, PooledCache
from splitlearn.models.cut import body_of, dtype_of, example, forward
from splitlearn.models.rope import is_pure
from splitlearn.stages.base import StageInput
from splitlearn.stages.engine import EagerEngine, TokenEngine
from splitlearn.stages.verify import reason_against, with_tokens_by

log = logging.getLogger(__name__)
Body = Callable[[], torch.Tensor]
Capture = Callable[[Body], Body]
"""Captures a function and returns one that replays it, into the same memory."""
Graphs = OrderedDict[tuple[int, int], Body]
"""Graphs by the address of the first layer's keys and the window."""
MIN_WINDOW = 256
"""The smallest window in tokens, and the block size of memory that is reused by one session after the other."""
MAX_GRAPHS = 64


def of(eager: EagerEngine, capture: Capture | None = None) -> TokenEngine | None:
    """The graph engine of a stage. If it cannot be captured: None, and a warning in the log."""
    cut, captured = eager.cut, None
    if is_pure(cut.module):
        reason: str | None = "the frequencies of its rotary embeddings change as the sequence grows"
    else:
        captured = GraphEngine(eager, capture or on_cuda(eager.device))
        reason = reason_against(cut, with_tokens_by(cut, captured.token))
    if reason is None:
        return captured
    log.warning("The layers [%d, %d) are not captured: %s", cut.start, cut.end, reason)
    return None


def on_cuda(device: torch.device) -> Capture:
    """Captures CUDA graphs, which share their intermediate memory: only one is replayed at a time."""
    memory = torch.cuda.graph_pool_handle()

    def capture(body: Body) -> Body:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            torch.cuda.synchronize()
            # thread_local: other threads of a server may use the device during a capture.
            with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
                out = body()

        def replay() -> torch.Tensor:
            with torch.cuda.device(device):
                graph.replay()
            return out

        return replay

    return capture


class GraphEngine:
    """Decodes one token by a replay, over a cache in a pool that later sessions reuse."""

    window, together = MIN_WINDOW, None
    caches: type[Cache] = PooledCache

    def __init__(self, eager: EagerEngine, capture: Capture) -> None:
        self._cut, self._capture, self.compile_s = eager.cut, capture, 0.0
        # Graphs are dropped with their pool: afterwards other memory may have the same addresses.
        self._graphs: WeakKeyDictionary[KVPool, Graphs] = WeakKeyDictionary()
        self._first: Body | None = None
        """Keeps the first graph, and with it the memory that all graphs share."""
        self._clean: WeakSet[PooledCache] = WeakSet()
        token = example(eager.cut, 1)
        width, dtype = body_of(eager.cut).config.get_text_config().hidden_size, dtype_of(eager.cut)
        self._in = _Mirror(token.shape, token.dtype, eager.device)
        self._position = _Mirror(torch.Size(), torch.long, eager.device)
        self._out = None if eager.cut.last else _Mirror(torch.Size((1, 1, width)), dtype, eager.device)

    def token(self, step: StageInput) -> torch.Tensor:
        """Replay: the hidden state [1, 1, H] on the host, or the logits [1, 1, V] on the device."""
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
        """Replay the graph for the cache's address and window. Captures it if there is none."""
        keys: torch.Tensor = cache.layers[0].keys
        window, graphs = _window(position + 1, keys.shape[2]), self._graphs.setdefault(cache.pool, OrderedDict())
        place = (keys.data_ptr(), window)
        if place not in graphs:
            if len(graphs) >= MAX_GRAPHS:
                graphs.popitem(last=False)
            layers = [_Window(layer, window, self._position.device) for layer in cache.layers]
            graphs[place] = self._new_graph(Cache(layers=layers))
        graphs.move_to_end(place)
        return graphs[place]()

    def _new_graph(self, windows: Cache) -> Body:
        def body() -> torch.Tensor:
            x, position = self._in.to_device(), self._position.to_device()
            out = forward(self._cut, x, position, windows, logits_to_keep=1)
            if self._out is not None:
                self._out.host.copy_(out, non_blocking=True)
            return out

        body()  # triggers torch.compile for a compiled stage, whose time is counted elsewhere
        began = time.perf_counter()
        body()
        graph = self._capture(body)
        self._first = self._first or graph
        self.compile_s += time.perf_counter() - began
        return graph

    def _clear(self, cache: PooledCache, position: int) -> None:
        """Set the memory behind `position` to zero. Masked values are multiplied by 0, so NaN there would spread; the
        memory is uninitialised or another session's."""
        for layer in cache.layers:
            layer.keys[:, :, position:].zero_()
            layer.values[:, :, position:].zero_()
        self._clean.add(cache)


class _Mirror:
    """A pair of tensors, on the device and on the host. For CUDA the host's is in pinned memory."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self.device = torch.zeros(shape, dtype=dtype, device=device)
        self.host = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")

    def to_device(self) -> torch.Tensor:
        """Copy the host's values to the device's tensor, and return it."""
        return self.device.copy_(self.host, non_blocking=True)


class _Window(StaticLayer):  # type: ignore[misc]
    """transformers' static layer over the first `window` tokens of a reserved one, at a position that all share."""

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
    """The smallest window for `tokens`: a power of two, at least MIN_WINDOW, at most `room`."""
    return min(room, max(MIN_WINDOW, 1 << (tokens - 1).bit_length()))
