"""Loads stages from the files of a model. Each process reads only its own slice of the weights.

The architecture is built without memory for its weights, cut, and then filled from the safetensors file. Stages that
are loaded together share tied tensors, so a client has one copy of its embedding and LM head.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from splitlearn.checkpoints.folder import ALIGNMENT, ModelFiles, read_config
from splitlearn.errors import ModelError, NotFinite, WeightsDamaged
from splitlearn.kernels.block_format import LANES
from splitlearn.layers.block_linear import MANY_ROWS
from splitlearn.models.cut import CutModel, carve
from splitlearn.models.part import Part
from splitlearn.models.plan import SplitPlan
from splitlearn.models.structure import join
from splitlearn.models.tensors import empty_model
from splitlearn.runtime import cgroups, private_apis
from splitlearn.runtime.device import resolve
from splitlearn.runtime.process import default_threads, resident_bytes, trim_heap
from splitlearn.runtime.torch_threads import in_full_float32
from splitlearn.stages import equivalence
from splitlearn.stages.engine import EagerEngine, StageEngine
from splitlearn.stages.head import Head, engine_of, undivided
from splitlearn.stages.local import LocalStage
from splitlearn.stages.settings import LoadSettings
from splitlearn.wire.codec import DTYPES

# Layers that are linear and nothing else. A family's own variant has a class of its own, and is left as it is.
LINEAR = (nn.Linear, Conv1D)
PIECE_BYTES = 8 << 20
_IN_BLOCKS = "Leave out the flag weight_dtype, and set model.dtype to bfloat16 or float32."
# The peak while weights are loaded: a factor for gaps between packed weights, and a constant for everything else.
# Measured by VmHWM, for two sizes of the default model's parts and three sets of flags.
PACKING, SPARE_BYTES = 1.1, 100_000_000


@dataclass(frozen=True)
class StageSpec:
    """The layers `[start, end)` of a model. `label` names their time in the time breakdown. A `last` one gives logits.
    A last stage without layers is the LM head."""

    label: str
    start: int
    end: int
    first: bool = False
    last: bool = False

    @property
    def is_head(self) -> bool:
        """Whether the stage begins with the final norm."""
        return self.last and not self.first and self.start == self.end


@dataclass(frozen=True)
class Placement:
    """The device and the dtype of the weights and of the computation."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, device: str, dtype: str) -> "Placement":
        """From the names in the config. Raises InputError for a device that this machine does not have."""
        return cls(resolve(device), DTYPES[dtype])


@dataclass(frozen=True)
class LoadedStages:
    """Stages in memory, and for a client the LM head. `load_s`: seconds of loading. `import_rss_bytes`: memory of the
    process before loading."""

    stages: tuple[LocalStage, ...]
    head: Head | None
    load_s: float
    import_rss_bytes: int

    @property
    def chain(self) -> tuple[LocalStage | Head, ...]:
        return self.stages if self.head is None else (*self.stages, self.head)


def full_specs(n_layers: int) -> list[StageSpec]:
    return [StageSpec("model", 0, n_layers, first=True, last=True)]


def client_specs(plan: SplitPlan) -> list[StageSpec]:
    """The client's bottom, its top if that has layers, and the LM head."""
    n = plan.n_layers
    top = [StageSpec("top", plan.end, n)] if plan.end < n else []
    return [StageSpec("bottom", 0, plan.start, first=True), *top, StageSpec("top", n, n, last=True)]


def trunk_specs(plan: SplitPlan) -> list[StageSpec]:
    return [StageSpec("trunk", plan.start, plan.end)]


def prepare_process(calls: Iterable[Callable[[], None]], threads: int | None) -> int:
    """Set the process's threads, and make the `calls` of flags of process scope. Returns the number of threads."""
    count = threads or default_threads()
    torch.set_num_threads(count)
    for call in calls:
        call()
    return count


def load(files: ModelFiles, specs: Sequence[StageSpec], settings: LoadSettings, placement: Placement) -> LoadedStages:
    """Load the stages `specs` with `settings`.

    Raises FamilyRefused for an architecture that does not run exactly in steps, or cannot be cut exactly. Raises
    WeightsDamaged if the file lacks a tensor of the architecture, ModelError if there is too little memory, or if
    `files` are a slice of other layers.
    """
    _check_part(files, specs)
    config = read_config(files.folder)
    equivalence.check(config, split=len(specs) > 1 or not (specs[0].first and specs[0].last))
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # imports it, before memory is looked at
    imports, started = resident_bytes(), time.perf_counter()
    cuts = [skeleton(architecture, config, spec, settings, placement.dtype) for spec in specs]
    if placement.device.type == "cpu":
        _check_memory(files, cuts, placement.dtype, settings)
    _fill(files, cuts, placement, settings)
    for cut in cuts:
        cut.module.to(placement.device)
    engines, size = [_engine(cut, files, settings, placement) for cut in cuts], files.facts.hidden_size
    pairs = list(zip(engines, specs, strict=True))
    stages = tuple(_layers(each, spec, settings, placement, config, size) for each, spec in pairs if not spec.is_head)
    head = next((_head(each, spec, placement, size) for each, spec in pairs if spec.is_head), None)
    return LoadedStages(stages, head, time.perf_counter() - started, imports)


def _check_part(files: ModelFiles, specs: Sequence[StageSpec]) -> None:
    """Raise ModelError if `files` are a slice of the model that lacks one of these stages."""
    part = files.part
    for spec in specs:
        if part is not None and not part.has(spec.start, spec.end, spec.first or spec.last):
            asked = Part(((spec.start, spec.end),), spec.first or spec.last)
            raise ModelError(f"{files.folder} has {part} of {files.name} alone, and {asked} are asked for.")


def skeleton(architecture: Any, config: Any, spec: StageSpec, settings: LoadSettings, dtype: torch.dtype) -> CutModel:
    """A cut model whose parameters take no memory yet."""
    model = empty_model(config, settings.attention, dtype)
    cut = carve(model, spec.start, spec.end, first=spec.first, last=spec.last)
    for own in cut.configs:
        # Other architectures (falcon) compare the name with "sdpa", and do something else for any other name.
        if private_apis.attention_of(own) == "sdpa" and private_apis.takes_any_attention(architecture):
            private_apis.set_attention(own, settings.sdpa)
    return cut


def _check_memory(files: ModelFiles, cuts: Sequence[CutModel], dtype: torch.dtype, settings: LoadSettings) -> None:
    """Raise ModelError if loading needs more memory than is available: the kernel would kill this process, or another
    one of the same container."""
    needed, have = _loading_bytes(files, cuts, dtype, settings), cgroups.available_memory()
    if needed > have:
        raise ModelError(
            f"Too little memory: loading the layers takes about {needed / 1e9:.2f} GB, and {have / 1e9:.2f} GB can be "
            f"had ({cgroups.machine()}). What helps: more memory, the preset fast, model.dtype: bfloat16, or a smaller "
            "model."
        )


def _loading_bytes(files: ModelFiles, cuts: Sequence[CutModel], dtype: torch.dtype, settings: LoadSettings) -> int:
    """An estimate of the peak memory of loading. Mapped weights do not count: the kernel can drop them."""
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
    copies = 0 if settings.assign_weights else 2 * every * stored.itemsize
    linears = sum(counts[name] for name in linear)
    made = linears if settings.linear else 0
    made_bytes = made * (settings.weight_bits or 8 * dtype.itemsize) // 8
    made_bytes += linears * dtype.itemsize if settings.engine else 0  # in an order of its own
    changed = (every - made) * dtype.itemsize if stored != dtype else 0
    return SPARE_BYTES + int(PACKING * (made_bytes + changed + copies))


def _fill(files: ModelFiles, cuts: Sequence[CutModel], placement: Placement, settings: LoadSettings) -> None:
    """Set each parameter and stored buffer. A name in the file is read once, so that tied weights are shared."""
    with safe_open(files.weights, framework="pt") as weights:
        copies = {} if settings.assign_weights else _second_copy(weights, files, cuts)
        have = dict(copies)
        for cut in cuts:
            _replace_linears(cut, settings, partial(_get_apart, files, copies), placement.dtype)
            for name, empty in cut.module.state_dict(keep_vars=True).items():
                full = cut.full_name(name)
                tensor = have[full] if full in have else read_tensor(weights, files, full)
                have[full] = tensor.to(placement.device, placement.dtype if tensor.is_floating_point() else None)
                put(cut.module, name, have[full], isinstance(empty, nn.Parameter))


def _replace_linears(
    cut: CutModel, settings: LoadSettings, get: Callable[[str], torch.Tensor], dtype: torch.dtype
) -> None:
    """Replace the linear layers and the LM head by those that `settings` makes from their weights."""
    module: Any = cut.module
    head = module.get_output_embeddings() if cut.last and settings.head else None
    linears = [(path, layer) for path, layer in module.named_modules() if type(layer) in LINEAR]
    for kind, makes in ((True, settings.head), (False, settings.linear)):
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
    """The shape of the weight as [out, in]."""
    n, k = linear.weight.shape
    return (k, n) if type(linear) is Conv1D else (n, k)


def _pieces(whole: Callable[[], torch.Tensor], transposed: bool, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The rows of a linear layer's weight [out, in], some at a time.

    `whole` maps the file again for each part, so that only that part counts as memory of this process.
    """
    start, end = 0, 1
    while start < end:
        weight = whole().t() if transposed else whole()
        end, rows = len(weight), LANES * max(1, PIECE_BYTES // (LANES * weight.shape[1] * weight.element_size()))
        yield weight[start : start + rows].to(dtype).contiguous()
        start += rows


def _get_apart(files: ModelFiles, copies: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """The tensor `name` of `copies`; or else from its own mapping of the file, which lives as long as the tensor."""
    if name in copies:
        return copies[name]
    with safe_open(files.weights, framework="pt") as own:
        return _get(own, files, name)


def _second_copy(weights: Any, files: ModelFiles, cuts: Sequence[CutModel]) -> dict[str, torch.Tensor]:
    """Load without low_cpu_mem_usage: the whole state dict is in memory in addition to the constructed model's tensors.

    Returns the model's tensors, into which the state dict was copied.
    """
    names = {cut.full_name(name) for cut in cuts for name in cut.module.state_dict()}
    state = {name: read_tensor(weights, files, name).clone() for name in names}
    constructed = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for name, tensor in constructed.items():
        tensor.copy_(state[name])
    return constructed


def read_tensor(weights: Any, files: ModelFiles, name: str) -> torch.Tensor:
    """The tensor `name`: a view of the mapped file, or a copy if the view is not aligned as torch's own memory is.

    Without alignment float32 products round differently, and a mapped load would not equal a copied one.
    """
    tensor = _get(weights, files, name)
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def _get(weights: Any, files: ModelFiles, name: str) -> torch.Tensor:
    try:
        tensor: torch.Tensor = weights.get_tensor(name)
    except Exception as error:  # safetensors does not export its own error classes
        reason = f"{files.weights} has no usable tensor {name} ({error})"
        raise WeightsDamaged(f"{reason}. Delete the folder {files.folder} and start again.") from error
    return tensor


def put(module: nn.Module, name: str, tensor: torch.Tensor, is_parameter: bool) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if is_parameter:
        owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        owner.register_buffer(leaf, tensor)


def _engine(cut: CutModel, files: ModelFiles, settings: LoadSettings, placement: Placement) -> StageEngine:
    """What computes the steps of a stage that has its weights."""
    if cut.last:
        module: Any = cut.module
        module.get_output_embeddings().register_forward_pre_hook(_with_own_row)
    long = 2 if settings.weight_bits is None else MANY_ROWS  # of fewer rows, the products stay as they are
    eager = EagerEngine(cut, placement.device, _row_threads(placement), torch.get_float32_matmul_precision(), long)
    return eager if settings.engine is None else settings.engine(eager, files, settings.weight_bits)


def _layers(
    engine: StageEngine, spec: StageSpec, settings: LoadSettings, placement: Placement, config: Any, hidden_size: int
) -> LocalStage:
    allows = cache(partial(equivalence.allows, config))
    if not isinstance(engine, EagerEngine):
        return LocalStage(engine, spec.label, placement.dtype, hidden_size, None, allows)
    eager = engine
    if settings.compile_stage is not None:
        eager = replace(eager, cut=settings.compile_stage(eager.cut))
    faster = None if settings.token_engine is None else settings.token_engine(eager)
    if faster is not None and faster.window and equivalence.STATIC_CACHE not in allows():
        faster = None  # a CUDA graph attends to masked memory of a fixed length, as a static cache does
    return LocalStage(eager, spec.label, placement.dtype, hidden_size, faster, allows)


def _head(eager: StageEngine, spec: StageSpec, placement: Placement, hidden_size: int) -> Head:
    if not isinstance(eager, EagerEngine):
        return Head(eager, spec.label, placement.dtype, undivided(eager))
    x = torch.randn(1, 1, hidden_size, generator=torch.Generator().manual_seed(0))
    with in_full_float32(eager.token_threads, eager.precision):
        engine = engine_of(eager.cut, x.to(placement.device, placement.dtype))
    return Head(eager, spec.label, placement.dtype, engine)


def _with_own_row(head: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A hook that copies the last row of a prompt's hidden states [1, T, H].

    For a row with the strides of T, torch makes a batched product instead of a matrix product. For that, oneDNN
    (float32_matmul_precision "medium") first makes a transposed copy of the head's weights.
    """
    x, *rest = arguments
    return (x.clone(memory_format=torch.contiguous_format) if x.shape[1] == 1 else x, *rest)


def _row_threads(placement: Placement) -> int:
    """Threads for a step of one token.

    torch multiplies one plain float32 row on one thread whatever the setting (1536x576 to 8192x2048, two cores). Other
    threads would be woken only for the small operations between. With packed weights, to wake a second thread for each
    product costs more than it gains: 31 ms a token instead of 23. In bfloat16 a second thread halves the time. For
    another device than the CPU the number does not matter.
    """
    return torch.get_num_threads() if placement.device.type == "cpu" and placement.dtype != torch.float32 else 1
