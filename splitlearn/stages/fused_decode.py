"""Fused decode: one kernel call takes a token, or a ragged batch of some, through all layers of a stage
(kernels/llama_decode.py), if they are as Llama's.

`of(eager)` checks the structure of the layers, then compares the kernel with the model's own forward
(stages/verify.py). The eager engine computes a stage that fails either check.
"""

import inspect
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache

from splitlearn.errors import StepUnwanted
from splitlearn.kernels.block_format import memory
from splitlearn.kvcache.layers import KVAddresses, ReservedCache
from splitlearn.layers import kernel_attention
from splitlearn.layers.block_linear import BlockLinear
from splitlearn.models.cut import CutModel, body_of, layers_of
from splitlearn.models.rope import GROWING
from splitlearn.runtime import private_apis
from splitlearn.stages.base import DROPS, DropMark, StageInput
from splitlearn.stages.engine import EagerEngine, TokenEngine
from splitlearn.stages.verify import reason_against, with_tokens_by

if TYPE_CHECKING:
    from splitlearn.kernels.thread_team import Team

# In the order of the kernel.
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
CHILDREN = {*NORMS, "self_attn", "mlp"}
FULL = "full_attention"
# Names that the code of an attention may use in addition to Llama's; `_is_llamas_body` excludes a sliding window. Any
# other name may depend on the position, and change results only after thousands of tokens: Ministral 3 scales queries
# from the 16,384th on.
ALLOWED = {"getattr", "sliding_window"}
TURNS = 256
# Half of the configured threads compute a single token. Client and trunk compute at the same time
# (generation/head_overlap.py): on one machine they would otherwise take each other's cores.
CORES_EACH = 2
# Helper threads start 0.1 to 0.4 ms late. Fewer bytes of weights than these are read by one thread in that time.
HELPED_BYTES = 8 << 20
_NEVER = DropMark(np.zeros(1, DROPS), 1)


def threads_for(size: int) -> int:
    """The threads for a token that reads `size` bytes of weights, by torch's number of threads."""
    return max(1, torch.get_num_threads() // CORES_EACH) if size >= HELPED_BYTES else 1


def of(eager: EagerEngine) -> TokenEngine | None:
    """The fused engine of a stage, or None for layers that are not as Llama's."""
    cut = eager.cut
    layers: list[Any] = list(layers_of(cut))
    if cut.compiled:
        return None
    if not layers or not all(map(_is_llamas, layers)) or not _is_llamas_body(cut, layers[0].self_attn.head_dim):
        return None
    if len({tuple((linear.out_features, linear.in_features) for linear in _linears(layer)) for layer in layers}) > 1:
        return None
    fused = FusedEngine(cut, layers)
    return fused if reason_against(cut, fused.together) is None else None


class FusedEngine:
    """Computes one or a few tokens in a kernel call, over reserved caches, whose memory the kernel can read.

    It holds the blocks of all linear layers in one piece of memory, in the order of reading. The memory is in huge
    pages if the system has them. So a token takes 0.93 to 0.96 times as long as with separate memory.
    """

    compile_s, window = 0.0, 0
    caches: type[Cache] = ReservedCache

    def __init__(self, cut: CutModel, layers: Sequence[Any]) -> None:
        from splitlearn.kernels import llama_decode, thread_team  # they load a compiler

        self._kernel, body, first = llama_decode, body_of(cut), layers[0]
        linears = [linear for layer in layers for linear in _linears(layer)]
        blocks, ends = _gathered(linears)
        norms = [getattr(layer, name).weight.detach() for layer in layers for name in NORMS]
        self._layers = llama_decode.Layers(
            blocks=blocks,
            ends=ends,
            bits=linears[0].bits,
            norms=torch.stack(norms).view(len(layers), 2, -1).numpy(),
            eps=first.input_layernorm.variance_epsilon,
            n_heads=first.self_attn.q_proj.out_features // first.self_attn.head_dim,
            inner=first.mlp.up_proj.out_features,
            scale=float(first.self_attn.scaling),
        )
        self._rotary, self._turns = body.rotary_emb, np.empty((0, 2, first.self_attn.head_dim), np.float32)
        self._embedding = body.embed_tokens.weight.detach().numpy() if cut.first else None
        module: Any = cut.module
        size = len(blocks) + (len(module.get_output_embeddings().array) if cut.last else 0)
        self._team = thread_team.Team(threads_for(size))
        self._all = thread_team.Team(torch.get_num_threads() if size >= HELPED_BYTES else 1)
        self._head = FusedHead(cut, 1.0, self._team) if cut.last else None

    def token(self, step: StageInput) -> torch.Tensor:
        """The hidden state [1, 1, H] or the logits [1, 1, V] of one token. Raises StepUnwanted."""
        return self._decoded([step], self._team, step.mark or _NEVER)

    def together(self, steps: Sequence[StageInput]) -> Sequence[torch.Tensor]:
        """The same for a ragged batch, by all threads: all tokens of each step, and logits of the last `step.logits`.
        Their caches are in one pool."""
        tokens = [step.x.shape[1] for step in steps]
        rows = tokens if self._head is None else [step.logits or own for step, own in zip(steps, tokens, strict=True)]
        kept = [np.arange(end - own, end) for own, end in zip(rows, accumulate(tokens), strict=True)]
        return torch.split(self._decoded(steps, self._all, _NEVER, np.concatenate(kept)), rows, dim=1)

    def _decoded(
        self, steps: Sequence[StageInput], team: "Team", mark: DropMark, rows: NDArray[np.int64] | slice = slice(None)
    ) -> torch.Tensor:
        """The hidden states [1, rows, H] or the logits [1, rows, V] of these rows of all tokens."""
        x = np.concatenate([step.x.numpy()[0] for step in steps])
        hidden = x if self._embedding is None else self._embedding[x]
        tokens = [step.x.shape[1] for step in steps]
        places: list[KVAddresses] = [step.session.cache.addresses for step in steps]
        starts = np.repeat([place.start for place in places], tokens)
        lengths = np.concatenate(
            [np.arange(step.position, step.position + own) for step, own in zip(steps, tokens, strict=True)]
        )
        kv = self._kernel.KVPlace(places[0].layers, places[0].shape, starts, lengths)
        turns = self._turns_up_to(int(lengths.max()))[lengths]
        with team.leading() as record:
            if not self._kernel.step(hidden, self._layers, kv, turns, *mark, record):
                raise StepUnwanted
            for step, own in zip(steps, tokens, strict=True):
                step.session.cache.grow(own)
            hidden = hidden[rows]
            return torch.from_numpy(hidden[None]) if self._head is None else self._head.logits(hidden, record)

    def _turns_up_to(self, position: int) -> NDArray[np.float32]:
        """cos and sin [more than position, 2, size] of each position, computed for TURNS positions at once."""
        turns = self._turns
        while position >= len(turns):
            more = torch.arange(len(turns), len(turns) + TURNS)[None]
            found = torch.stack(self._rotary(torch.from_numpy(self._layers.norms), more), dim=2)[0].numpy()
            self._turns = turns = np.concatenate([turns, found])
        return turns


class FusedHead:
    """Computes the final norm and the LM head of one token by the kernel. About `share` of the logits comes first.

    It makes its own `team` of threads if it is not given one.
    """

    by_kernel = True

    def __init__(self, cut: CutModel, share: float, team: "Team | None" = None) -> None:
        from splitlearn.kernels import llama_decode, thread_team  # they load a compiler

        module: Any = cut.module
        self._linear: BlockLinear = module.get_output_embeddings()
        self._kernel, norm = llama_decode.head, body_of(cut).norm
        self._norm, self._eps = norm.weight.detach().numpy(), norm.variance_epsilon
        self._cut_at = self._linear.cut(share)
        self._team = team or thread_team.Team(threads_for(len(self._linear.array)))

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """The logits [1, 1, V] of a hidden state [1, 1, H]."""
        with self._team.leading() as record:
            return self.logits(x.numpy()[0], record)

    def logits(self, hidden: NDArray[np.float32], record: NDArray[Any]) -> torch.Tensor:
        """The logits [1, T, V] of `hidden` [T, H], by the threads of a team's `record`."""
        logits = self._new(len(hidden))
        self._fill(logits, hidden, self._linear.array, record)
        return torch.from_numpy(logits[None])

    def in_parts(self, x: torch.Tensor) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
        """The first logits [1, 1, k] of one token, and a function that computes the others and returns all."""
        logits, hidden, (at, first, others) = self._new(1), x.numpy()[0], self._cut_at
        with self._team.leading() as record:
            self._fill(logits[:, :at], hidden, first, record)

        def finish() -> torch.Tensor:
            self._fill(logits[:, at:], hidden, others, self._team.alone())  # the trunk computes at the same time
            return torch.from_numpy(logits[None])

        return torch.from_numpy(logits[None, :, :at]), finish

    def _new(self, rows: int) -> NDArray[np.float32]:
        return np.empty((rows, self._linear.out_features), np.float32)

    def _fill(self, logits: NDArray[Any], hidden: NDArray[Any], blocks: NDArray[Any], record: NDArray[Any]) -> None:
        """Set `logits` [T, n] to the products of `hidden` [T, H] with the rows of the head in `blocks`."""
        self._kernel(hidden, self._norm, self._eps, blocks, self._linear.bits, logits, record)


def head_of(cut: CutModel, share: float) -> FusedHead | None:
    """The fused engine of a stage without layers, which gives about `share` of the logits first. None if its logits
    differ from those of the stage's own forward."""
    if cut.compiled or not _ends_as_llama(cut):
        return None
    fused = FusedHead(cut, share)
    by_kernel = with_tokens_by(cut, lambda step: fused.whole(step.x))
    return fused if reason_against(cut, by_kernel) is None else None


def _linears(layer: Any) -> list[Any]:
    parts = [getattr(layer.self_attn, name, None) for name in ATTENTION]
    return parts + [getattr(layer.mlp, name, None) for name in MLP]


def _gathered(linears: Sequence[BlockLinear]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The blocks of all linears in one piece of memory; where each begins, and the end. They are moved there if they do
    not lie so."""
    arrays = [linear.array for linear in linears]
    ends = np.array([0, *accumulate(map(len, arrays))])
    starts = np.array([array.ctypes.data for array in arrays])
    if (starts - starts[0] == ends[:-1]).all():
        return np.lib.stride_tricks.as_strided(arrays[0], (int(ends[-1]),)), ends
    blocks = memory(int(ends[-1]))
    for linear, begin, end in zip(linears, ends[:-1], ends[1:], strict=True):
        linear.move(blocks[begin:end])
    return blocks, ends


def _is_llamas(layer: Any) -> bool:
    """Whether a layer has Llama's parts and no others, in the form that the kernel expects."""
    if {name for name, _ in layer.named_children()} != CHILDREN:
        return False
    if private_apis.attention_of(layer.self_attn.config) not in ("sdpa", kernel_attention.NAME):
        return False
    if not _uses_names_of(layer.self_attn, "LlamaAttention"):
        return False
    linears, norms = _linears(layer), [getattr(layer, name) for name in NORMS]
    return all(map(_is_whole, linears)) and len({linear.bits for linear in linears}) == 1 and all(map(_is_norm, norms))


def _is_llamas_body(cut: CutModel, head_size: int) -> bool:
    """Whether the modules around the layers are as Llama's, and each token attends to all before it."""
    body = body_of(cut)
    rotary: Any = getattr(body, "rotary_emb", None)
    config = body.config
    if getattr(rotary, "rope_type", GROWING[0]) in GROWING or 2 * len(rotary.inv_freq) != head_size:
        return False
    if not _uses_names_of(rotary, "LlamaRotaryEmbedding"):
        return False
    if getattr(config, "sliding_window", None) or {*(getattr(config, "layer_types", None) or [FULL])} != {FULL}:
        return False
    if cut.first and body.embed_tokens.weight.dtype != torch.float32:
        return False
    return not cut.last or _ends_as_llama(cut)


def _ends_as_llama(cut: CutModel) -> bool:
    """Whether norm and LM head have the form that the kernel expects."""
    norm, module = getattr(body_of(cut), "norm", None), cast(Any, cut.module)
    return _is_norm(norm) and _is_whole(module.get_output_embeddings())


def _uses_names_of(module: Any, name: str) -> bool:
    """Whether the code of a module's forward uses only names that the class `name` of Llama uses, or ALLOWED ones."""
    from transformers.models.llama import modeling_llama

    own, llamas = (
        set(inspect.unwrap(each.forward).__code__.co_names) for each in (module, getattr(modeling_llama, name))
    )
    return own <= llamas | ALLOWED


def _is_whole(linear: Any) -> bool:
    return isinstance(linear, BlockLinear) and linear.whole and linear.bias is None


def _is_norm(norm: Any) -> bool:
    return hasattr(norm, "variance_epsilon") and norm.weight.dtype == torch.float32
