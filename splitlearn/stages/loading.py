"""From the files of a model to stages in memory: each process reads only its own slice of the weights.

The architecture is built without memory for its weights, cut, and then given its own tensors from the safetensors
file. Stages that are loaded together share a tied tensor, so a client's embedding and LM head are there once.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from splitlearn.checkpoints.folder import ALIGNMENT, ModelFiles, read_config
from splitlearn.errors import ModelError, NotFinite, WeightsDamaged
from splitlearn.kernels.block_format import LANES
from splitlearn.models.cut import CutModel, carve
from splitlearn.models.plan import SplitPlan
from splitlearn.models.structure import join
from splitlearn.runtime import cgroups, private_apis
from splitlearn.runtime.device import resolve
from splitlearn.runtime.process import default_threads, resident_bytes, trim_heap
from splitlearn.runtime.torch_threads import computing_one_token
from splitlearn.stages import equivalence
from splitlearn.stages.base import Stage
from splitlearn.stages.engine import Eager
from splitlearn.stages.head import Head, engine_of
from splitlearn.stages.local import LocalStage
from splitlearn.stages.settings import LoadSettings
from splitlearn.wire.codec import DTYPES

# Layers that are linear and nothing else; what a family makes of them has a class of its own.
LINEAR = (nn.Linear, Conv1D)
PIECE_BYTES = 8 << 20
_IN_BLOCKS = "Leave out the flag weight_dtype, and set model.dtype to bfloat16 or float32."
# Of a peak while weights are loaded: what is lost between packed weights, and what else a process comes to hold (two
# sizes of the default model's parts and three of its sets of flags, by VmHWM).
PACKING, SPARE_BYTES = 1.1, 100_000_000


@dataclass(frozen=True)
class StageSpec:
    """The layers `[start, end)` of a model; `word` names their time in the time breakdown. A `last` stage gives logits;
    without layers it is the LM head."""

    word: str
    start: int
    end: int
    first: bool = False
    last: bool = False

    @property
    def is_head(self) -> bool:
        """Whether nothing comes before the final norm."""
        return self.last and not self.first and self.start == self.end


@dataclass(frozen=True)
class Placement:
    """Where and in which dtype weights are held and computed with."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, device: str, dtype: str) -> "Placement":
        """By the names that the config has for them. Raises InputError for a device that this machine does not have."""
        return cls(resolve(device), DTYPES[dtype])


@dataclass(frozen=True)
class Loaded:
    """Stages in memory, of which a client's last is the LM head; what loading took, and what the process held before it
    (its imports)."""

    stages: tuple[LocalStage, ...]
    head: Head | None
    load_s: float
    import_rss_bytes: int

    @property
    def chain(self) -> tuple[Stage, ...]:
        return self.stages if self.head is None else (*self.stages, self.head)


def full_specs(n_layers: int) -> list[StageSpec]:
    return [StageSpec("model", 0, n_layers, first=True, last=True)]


def client_specs(plan: SplitPlan) -> list[StageSpec]:
    """The client's bottom, its top, if that has layers, and the LM head."""
    n = plan.n_layers
    top = [StageSpec("top", plan.end, n)] if plan.end < n else []
    return [StageSpec("bottom", 0, plan.start, first=True), *top, StageSpec("top", n, n, last=True)]


def trunk_specs(plan: SplitPlan) -> list[StageSpec]:
    return [StageSpec("trunk", plan.start, plan.end)]


def prepare_process(calls: Iterable[Callable[[], None]], threads: int | None) -> int:
    """Set what belongs to a whole process: threads, and what flags of process scope call. Returns the threads."""
    count = threads or default_threads()
    torch.set_num_threads(count)
    for call in calls:
        call()
    return count


def load(files: ModelFiles, specs: Sequence[StageSpec], wanted: LoadSettings, placement: Placement) -> Loaded:
    """Load the stages `specs` as `wanted`.

    Raises FamilyRefused for an architecture that does not run exactly in steps, or cannot be cut exactly,
    WeightsDamaged for a file without a tensor that the architecture has, ModelError where there is too little memory.
    """
    config = read_config(files.folder)
    equivalence.check(config, split=len(specs) > 1 or not (specs[0].first and specs[0].last))
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # imports it, before memory is looked at
    imports, started = resident_bytes(), time.perf_counter()
    cuts = [_skeleton(architecture, config, spec, wanted, placement.dtype) for spec in specs]
    if placement.device.type == "cpu":
        _check_memory(files, cuts, placement.dtype, wanted)
    _fill(files, cuts, placement, wanted)
    for cut in cuts:
        cut.module.to(placement.device)
    pairs, size = list(zip([_eager(cut, placement) for cut in cuts], specs, strict=True)), files.facts.hidden_size
    stages = tuple(_layers(eager, spec, wanted, placement, config, size) for eager, spec in pairs if not spec.is_head)
    head = next((_head(eager, spec, placement, size) for eager, spec in pairs if spec.is_head), None)
    return Loaded(stages, head, time.perf_counter() - started, imports)


def _skeleton(architecture: Any, config: Any, spec: StageSpec, wanted: LoadSettings, dtype: torch.dtype) -> CutModel:
    """A cut model whose parameters take no memory yet; its computed buffers (rotary frequencies) are real."""
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = private_apis.new_causal_model(architecture, config, wanted.attention, dtype)
    cut = carve(model.eval(), spec.start, spec.end, first=spec.first, last=spec.last)
    for own in cut.configs:
        # Elsewhere (falcon) layers compare the name with sdpa's and do something else for any other.
        if private_apis.attention_of(own) == "sdpa" and private_apis.takes_any_attention(architecture):
            private_apis.set_attention(own, wanted.sdpa)
    return cut


def _check_memory(files: ModelFiles, cuts: Sequence[CutModel], dtype: torch.dtype, wanted: LoadSettings) -> None:
    """Raise ModelError where loading would take more memory than can be had: the kernel would end this process, or
    another one of the same container."""
    needed, have = _loading_bytes(files, cuts, dtype, wanted), cgroups.available_memory()
    if needed > have:
        raise ModelError(
            f"Too little memory: loading the layers takes about {needed / 1e9:.2f} GB, and {have / 1e9:.2f} GB can be "
            f"had ({cgroups.machine()}). What helps: more memory, the preset fast, model.dtype: bfloat16, or a smaller "
            "model."
        )


def _loading_bytes(files: ModelFiles, cuts: Sequence[CutModel], dtype: torch.dtype, wanted: LoadSettings) -> int:
    """About how much loading takes at its peak. Weights that stay mapped take none: the kernel can drop them."""
    counts, linear = {}, set()
    for cut in cuts:
        for path, layer in cut.module.named_modules():
            for name, value in layer.named_parameters(recurse=False):
                full = cut.full_name(join(path, name))
                counts[full] = value.numel()
                linear |= {full} if type(layer) in LINEAR else set()
    if not counts:
        return SPARE_BYTES
    with safe_open(files.weights, framework="pt") as weights:
        stored = _get(weights, files, next(iter(counts))).dtype
    every = sum(counts.values())
    copies = 0 if wanted.assign_weights else 2 * every * stored.itemsize
    made = sum(counts[name] for name in linear) if wanted.linear else 0
    made_bytes = made * (wanted.weight_bits or 8 * dtype.itemsize) // 8
    changed = (every - made) * dtype.itemsize if stored != dtype else 0
    return SPARE_BYTES + int(PACKING * (made_bytes + changed + copies))


def _fill(files: ModelFiles, cuts: Sequence[CutModel], placement: Placement, wanted: LoadSettings) -> None:
    """Give each parameter and stored buffer its tensor, once for each name in the file."""
    with safe_open(files.weights, framework="pt") as weights:
        copies = {} if wanted.assign_weights else _second_copy(weights, files, cuts)
        have = dict(copies)
        for cut in cuts:
            _replace_linears(cut, wanted, partial(_get_apart, files, copies), placement.dtype)
            for name, empty in cut.module.state_dict(keep_vars=True).items():
                full = cut.full_name(name)
                tensor = have[full] if full in have else _read(weights, files, full)
                have[full] = tensor.to(placement.device, placement.dtype if tensor.is_floating_point() else None)
                _put(cut.module, name, have[full], isinstance(empty, nn.Parameter))


def _replace_linears(
    cut: CutModel, wanted: LoadSettings, get: Callable[[str], torch.Tensor], dtype: torch.dtype
) -> None:
    """Put what `wanted` makes of their weights in the place of the linear layers and of the LM head."""
    module: Any = cut.module
    head = module.get_output_embeddings() if cut.last and wanted.head else None
    linears = [(path, layer) for path, layer in module.named_modules() if type(layer) in LINEAR]
    for kind, makes in ((True, wanted.head), (False, wanted.linear)):
        some = [(path, layer) for path, layer in linears if (layer is head) is kind]
        if makes is None or not some:
            continue
        make = makes([_shape(layer) for _, layer in some])
        for path, layer in some:
            whole = partial(get, cut.full_name(join(path, "weight")))
            bias = None if layer.bias is None else get(cut.full_name(join(path, "bias"))).to(dtype, copy=True)
            try:
                module.set_submodule(path, make(_pieces(whole, type(layer) is Conv1D, dtype), bias))
            except NotFinite as error:
                raise NotFinite(f"{cut.full_name(join(path, 'weight'))}: {error} {_IN_BLOCKS}") from error
            trim_heap()


def _shape(linear: Any) -> tuple[int, int]:
    """Of the weight [out, in]."""
    n, k = linear.weight.shape
    return (k, n) if type(linear) is Conv1D else (n, k)


def _pieces(whole: Callable[[], torch.Tensor], transposed: bool, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The rows of a linear layer's weight [out, in], some at a time.

    `whole` maps the file anew for each piece, so that no more of it than a piece counts as memory of this process.
    """
    start, end = 0, 1
    while start < end:
        weight = whole().t() if transposed else whole()
        end, rows = len(weight), LANES * max(1, PIECE_BYTES // (LANES * weight.shape[1] * weight.element_size()))
        yield weight[start : start + rows].to(dtype).contiguous()
        start += rows


def _get_apart(files: ModelFiles, copies: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """The tensor `name` of `copies`, or in a mapping of the file of its own, which ends with it."""
    if name in copies:
        return copies[name]
    with safe_open(files.weights, framework="pt") as own:
        return _get(own, files, name)


def _second_copy(weights: Any, files: ModelFiles, cuts: Sequence[CutModel]) -> dict[str, torch.Tensor]:
    """What loading costs without low_cpu_mem_usage: the whole state dict in memory beside the constructed model's own.

    Returns the constructed model's tensors, into which the state dict was copied.
    """
    names = {cut.full_name(name) for cut in cuts for name in cut.module.state_dict()}
    state = {name: _read(weights, files, name).clone() for name in names}
    constructed = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for name, tensor in constructed.items():
        tensor.copy_(state[name])
    return constructed


def _read(weights: Any, files: ModelFiles, name: str) -> torch.Tensor:
    """The tensor `name`, a view of the mapped file where that is aligned as torch's own memory is.

    Elsewhere float32 products would round differently, and a mapped load would not equal a copied one.
    """
    tensor = _get(weights, files, name)
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def _get(weights: Any, files: ModelFiles, name: str) -> torch.Tensor:
    try:
        tensor: torch.Tensor = weights.get_tensor(name)
    except Exception as error:  # safetensors raises errors of its own that it does not export
        wrong = f"{files.weights} has no usable tensor {name} ({error})"
        raise WeightsDamaged(f"{wrong}. Delete the folder {files.folder} and start again.") from error
    return tensor


def _put(module: nn.Module, name: str, tensor: torch.Tensor, is_parameter: bool) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if is_parameter:
        owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        owner.register_buffer(leaf, tensor)


def _layers(
    eager: Eager, spec: StageSpec, wanted: LoadSettings, placement: Placement, config: Any, hidden_size: int
) -> LocalStage:
    if wanted.compile_stage is not None:
        eager = replace(eager, cut=wanted.compile_stage(eager.cut))
    allows = cache(partial(equivalence.allows, config))
    faster = None if wanted.engine is None else wanted.engine(eager)
    if faster is not None and faster.window and equivalence.STATIC_CACHE not in allows():
        faster = None  # a capture attends to masked memory of one length, too
    return LocalStage(eager, spec.word, placement.dtype, hidden_size, faster, allows)


def _head(eager: Eager, spec: StageSpec, placement: Placement, hidden_size: int) -> Head:
    x = torch.randn(1, 1, hidden_size, generator=torch.Generator().manual_seed(0))
    with computing_one_token(eager.token_threads, eager.precision):
        engine = engine_of(eager.cut, x.to(placement.device, placement.dtype))
    return Head(eager, spec.word, placement.dtype, engine)


def _eager(cut: CutModel, placement: Placement) -> Eager:
    if cut.last:
        module: Any = cut.module
        module.get_output_embeddings().register_forward_pre_hook(_with_own_row)
    return Eager(cut, placement.device, _row_threads(placement), torch.get_float32_matmul_precision())


def _with_own_row(head: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The last row of a prompt's hidden states [1, T, H], copied out of them.

    torch makes no matrix product of a row with the strides of T, but a batched one, for which oneDNN
    (float32_matmul_precision "medium") first makes a transposed copy of the head's weights.
    """
    x, *rest = arguments
    return (x.clone(memory_format=torch.contiguous_format) if x.shape[1] == 1 else x, *rest)


def _row_threads(placement: Placement) -> int:
    """Threads for a step of one token.

    torch multiplies one plain float32 row on one thread whatever the setting (1536x576 to 8192x2048, two cores), so
    that the others would only be woken for the small operations between. With packed weights a second thread that has
    to be woken for each product costs more than it brings (31 ms a token in place of 23). In bfloat16 it halves the
    time. Beside another device the CPU computes nothing.
    """
    return torch.get_num_threads() if placement.device.type == "cpu" and placement.dtype != torch.float32 else 1
