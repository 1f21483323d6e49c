"""Every call into a private API of another library. An upgrade that breaks one fails here, and in this module's tests.

Each has no public counterpart that does the same. Libraries are imported when they are needed.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


def without_scipy() -> None:
    """transformers: let it hold that scipy is not installed. Before its models are imported: that imports scipy for
    losses of object detection, a tenth of the time and 35 MB."""
    from transformers import utils
    from transformers.utils import import_utils

    import_utils.is_scipy_available = utils.is_scipy_available = lambda: False


def new_causal_model(architecture: Any, config: Any, attention: str | None, dtype: Any) -> Any:
    """transformers: a model of the class `architecture` as `config` says, its weights not read. The public
    `from_config` is of the Auto classes and takes no dtype for a class that was chosen already."""
    return architecture._from_config(config, attn_implementation=attention, dtype=dtype)


def attention_of(config: Any) -> str | None:
    """transformers: which attention the layers of `config` use."""
    name: str | None = config._attn_implementation
    return name


def set_attention(config: Any, name: str | None) -> None:
    """transformers: let the layers of `config` use the attention registered as `name`. The public
    `set_attn_implementation` of a model walks all of it, and refuses names that are no package's."""
    config._attn_implementation = name


def takes_any_attention(architecture: Any) -> bool:
    """transformers: True if layers of this class take what the attention registry has under the config's name."""
    return bool(architecture._supports_attention_backend)


def forget_kernels(config: Any) -> None:
    """transformers: drop the kernels that a model's own configuration names; one may be fetched from the hub."""
    config._attn_implementation = config._experts_implementation = None


def checkpoint_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """transformers: the name in the state dict of `model` of each tensor `names` of a checkpoint; of one that becomes
    several, the first. Public from_pretrained does this only for all tensors at once."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def renamed(name: str) -> str:
        found, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if found not in state and name in state:
            return name
        return str(found)

    return {name: renamed(name) for name in names}


def unplaced(model: Any, names: Iterable[str]) -> set[str]:
    """transformers: those of `names` that the model has no place for, without what its class says may be there."""
    from transformers.utils.loading_report import LoadStateDictInfo

    info = LoadStateDictInfo(set(), set(names) - set(model.state_dict()), set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(info)
    return set(info.unexpected_keys)


def load_tensors(model: Any, tensors: Mapping[str, Any], dtype: Any) -> tuple[set[Any], dict[str, str]]:
    """transformers: convert some tensors of a checkpoint, and put them into `model` in the place of its empty ones.

    Returns those of another shape (name, shape there, shape in the model), and what could not be converted and why.
    Public from_pretrained makes up what is not given.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    plan, mapping = model._get_dtype_plan(dtype), get_model_conversion_mapping(model)
    how = LoadStateDictConfig(dtype=dtype, dtype_plan=plan, weight_mapping=mapping)
    info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), how)
    return set(info.mismatched_keys), dict(info.conversion_errors)


def gguf_conversion(path: Path, model: Any) -> Callable[[str, Any], dict[str, Any]] | None:
    """transformers: what makes of a tensor of a GGUF file (its name there and its float32 array) those of `model`, by
    their names. None for an architecture whose tensors are made of several. Public from_pretrained does this only for
    all tensors at once, and holds them all."""
    from transformers import modeling_gguf_pytorch_utils as of_gguf
    from transformers.integrations.gguf import is_gguf_arch_supported, read_gguf_metadata

    architecture = read_gguf_metadata(str(path))[0]["general.architecture"]
    plain = of_gguf.TensorProcessor
    kind = of_gguf.TENSOR_PROCESSORS.get(architecture, plain)
    merges = kind.perform_fallback_tensor_mapping is not plain.perform_fallback_tensor_mapping
    if merges or is_gguf_arch_supported(architecture):
        return None
    processor = kind(config=of_gguf.load_gguf_checkpoint(str(path))["config"])
    names = of_gguf.get_gguf_hf_weights_map(model, processor)

    def convert(name: str, values: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        done = processor.process(
            weights=values, name=name, tensor_key_mapping=names, parsed_parameters={"tensors": found}
        )
        if done.name in names:
            found[names[done.name]] = done.weights
        return found

    return convert


def hub_sha256(storage: Path, commit: str) -> dict[str, str]:
    """huggingface_hub: the SHA-256 of each large file of a commit, as the hub listed it when files of it were fetched
    into the folder `storage`. The public get_cached_repo_tree leaves them out."""
    from huggingface_hub._tree_cache import read_tree_cache

    entries = read_tree_cache(str(storage), commit) or {}
    return {path: entry.lfs_sha256 for path, entry in entries.items() if entry.lfs_sha256 is not None}


def python_tokenizer_class(rust_tokenizer: Any) -> Any:
    """transformers: the Python class that does the work of a Rust tokenizer's, or None. The name is a convention."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    return tokenizer_class_from_name(f"{type(rust_tokenizer).__name__}Legacy")


def shipped_response_templates() -> list[dict[str, Any]]:
    """transformers: how the models that its own server knows write tool calls, for tokenizers that do not say it."""
    from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS

    return list(_RESPONSE_TEMPLATE_FALLBACKS.values())


def response_parser(template: dict[str, Any], prefix: str, tools: list[dict[str, Any]]) -> Any:
    """transformers: a ResponseParser that goes on after a region that it cannot read, requires none, and looks at a
    prefix only behind its anchor. The close of an unreadable region has the value None; the public class raises, and
    loses the events before it."""
    from transformers.utils.chat_parsing import ResponseParser
    from transformers.utils.chat_parsing.response_templates import load_response_template

    class LenientParser(ResponseParser):  # type: ignore[misc]
        def _close_current(self, events: list[dict[str, Any]]) -> None:
            try:
                super()._close_current(events)
            except Exception:  # of any class: what a model writes goes through the operators of a template
                events.append({"type": "region_close", "field": self._current, "value": None})
                self._reset_to_implicit()

    loaded = load_response_template(template)
    for field in loaded.fields.values():
        field.optional = True
    return LenientParser(loaded, prefix=prefix if loaded.start_anchor_re.search(prefix) else "", tools=tools)


def only_chat_parts() -> None:
    """transformers: import its chat_template_utils and chat_parsing without the package's own start, which lists all
    models and looks for torch: 0.1 s and 28 MB, not 0.65 s and 60 MB. For a process that needs no more,
    whose values come from JSON: it has no pictures, no progress bars, and of numpy only the type that no value has."""
    sys.modules["torch"] = sys.modules["PIL"] = None  # type: ignore[assignment]  # which are then not found
    absent = type("Absent", (), {"set_lock": lambda lock: None})
    for name, given in (("tqdm", "tqdm"), ("tqdm.auto", "tqdm"), ("numpy", "generic")):
        vars(sys.modules.setdefault(name, ModuleType(name)))[given] = absent
    vars(sys.modules["tqdm"])["auto"] = sys.modules["tqdm.auto"]
    path = None
    for name in ("transformers", "transformers.utils"):
        spec = PathFinder.find_spec(name, path)
        assert spec is not None and spec.submodule_search_locations is not None
        path = list(spec.submodule_search_locations)
        package = sys.modules[name] = ModuleType(name)
        package.__path__, package.__spec__ = path, spec
    for name in ("chat_template_utils", "chat_parsing"):
        import_module(f"transformers.utils.{name}")


def rendered_chat(
    template: str, messages: list[Any], tools: list[Any] | None, header: bool, special_tokens: dict[str, Any]
) -> str:
    """transformers: what a tokenizer's `apply_chat_template` renders, without the tokenizer."""
    from transformers.utils.chat_template_utils import render_jinja_template

    chosen = {"tools": tools, "chat_template": template, "add_generation_prompt": header}
    rendered, _ = render_jinja_template([messages], **chosen, **special_tokens)
    return str(rendered[0])


def mkldnn_packed(weight: Any) -> Any:
    """torch: `weight` [out, in] in the blocked layout that oneDNN's product reads."""
    import torch

    return torch.ops.mkldnn._reorder_linear_weight(weight)


def mkldnn_linear() -> Any:
    """torch: the operator (x [..., in], packed weight, bias, "none", [], "") to x @ weight.T + bias [..., out]."""
    import torch

    return torch.ops.mkldnn._linear_pointwise


def mkldnn_supports(dtype: str) -> bool:
    """torch: True if this processor has oneDNN's products of `dtype`: float32, bfloat16 or float16."""
    import torch

    asks = {
        "bfloat16": torch.ops.mkldnn._is_mkldnn_bf16_supported,
        "float16": torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype == "float32" or bool(asks[dtype]())


def onnx_rounded(matrix: Any, bits: int, block: int) -> tuple[Any, Any, Any]:
    """onnxruntime: a float32 matrix [in, out] in 4 or 8 bits, each column in blocks: values uint8 [out, blocks, bytes],
    scales [out, blocks], offsets uint8 [out, bytes]. The public quantizer's module sets up logging when it is imported,
    and takes whole models."""
    import numpy as np
    from onnxruntime.capi import _pybind_state as native

    rows, columns = matrix.shape
    blocks, each = -(-rows // block), 8 // bits
    whole = np.pad(matrix, ((0, blocks * block - rows), (0, 0)))
    values = np.zeros((columns, blocks, block // each), np.uint8)
    scales = np.zeros((columns, blocks), np.float32)
    offsets = np.zeros((columns, -(-blocks // each)), np.uint8)
    make = native.quantize_matmul_8bits if bits == 8 else native.quantize_matmul_4bits
    make(values, whole, scales, offsets, block, columns, rows, False)
    return values, scales, offsets


def import_torchax() -> Any:
    """torchax: the package. Importing it registers a device with torch, which says that it can be used, and whose
    `get_rng_state` does not take the device that torch gives it: `torch.compile`, which asks for the device's stream,
    and `torch.random.fork_rng` would fail in the whole process."""
    import torchax

    torchax.device_module.is_available = lambda: False
    torchax.device_module.get_rng_state = lambda device=None: []
    return torchax


def compile_seconds() -> float:
    """torch: seconds that this process has spent in torch.compile so far; 0 when nothing was ever compiled."""
    if "torch._dynamo.utils" not in sys.modules:
        return 0.0
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent().get("total_wall_time", 0.0))


def allow_variants(count: int) -> None:
    """torch: let torch.compile keep at least `count` variants of one function before it gives up."""
    import torch

    torch._dynamo.config.recompile_limit = max(count, torch._dynamo.config.recompile_limit)


def with_children(module: Any, change: Callable[[Any], Any]) -> Any:
    """torch: a copy of `module` whose children are what `change` makes of them. It shares all else: parameters, buffers
    and hooks. A deep copy would hold the weights twice."""
    own = copy.copy(module)
    own._modules = {name: child if child is None else change(child) for name, child in module._modules.items()}
    return own


def end_call(context: Any, code: Any, reason: str) -> None:
    """grpc: end a running call with the status `code` and `reason`. `context.abort` is for the handler's own thread,
    which may be the one that waits; `context.cancel` gives no reason."""
    context._rpc_event.call.cancel(code.value[0], reason)


def page_queue(blocks: Any) -> Any:
    """gradio: the queue of a page, with what waits to be read for each session."""
    return blocks._queue


def mcp_calls_as(page: Any, login: tuple[str, str] | None) -> None:
    """gradio: let the MCP tools of the launched `page` log in: they call it by HTTP."""
    from gradio.mcp import Client

    quiet = {"download_files": False, "verbose": False, "analytics_enabled": False}
    headers = {"x-gradio-user": "mcp"}
    page.mcp_server_obj._client_instance = Client(page.local_url, auth=login, headers=headers, **quiet)


@contextmanager
def without_stub_files() -> Iterator[None]:
    """gradio: inside, importing it writes no .pyi files beside its components, which takes two fifths of the import.

    It writes them for each class that it defines, and skips one whose source file is not found.
    """
    genuine = inspect.getfile

    def getfile(found: Any) -> str:
        if type(found).__name__ == "ComponentMeta":
            raise OSError("no stub file is wanted")
        return genuine(found)

    inspect.getfile = getfile  # type: ignore[assignment]
    try:
        yield
    finally:
        inspect.getfile = genuine
