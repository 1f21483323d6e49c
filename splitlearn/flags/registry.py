"""Every optimization flag, defined once.

A `Flag` is a record; `FLAGS` is the registry that everything else iterates. Each choice of a flag changes `Settings`:
the seams that the owners of loading, cache, forward pass, sampler and so on apply without knowing which flag asked.
To add a flag, add a record here, and a seam to `Settings` if none fits (docs/add-a-flag.md).

Fidelity: `exact` gives bit-equal logits, `rounding` adds in another order, `lossy` changes the numbers on purpose.
Scope: a `session` flag is chosen with each generation, a `load` flag when weights are loaded, a `process` flag once in
a process's life.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Literal

from splitlearn.runtime import hardware

if TYPE_CHECKING:
    from splitlearn.generation.settings import GenerationSettings
    from splitlearn.stages.settings import LoadSettings, SessionSettings

Side = Literal["full", "client", "trunk"]
Fidelity = Literal["exact", "rounding", "lossy"]
Scope = Literal["session", "load", "process"]
SIDES: tuple[Side, ...] = ("full", "client", "trunk")
LOCAL: frozenset[Side] = frozenset({"full", "client"})


@dataclass(frozen=True)
class Settings:
    """What the applied flags of a side add up to, by the code that applies it. `process` is called once a process."""

    process: tuple[Callable[[], None], ...]
    load: LoadSettings
    session: SessionSettings
    generation: GenerationSettings


@dataclass(frozen=True)
class Place:
    """What decides whether a process can apply a flag: device, dtype, processor, model and installed tools.

    Each `no_...` says why something is missing, None where it is there: a Python tokenizer, truncation of the KV cache,
    reuse of a prefix by another sequence, oneDNN's products in this dtype, a draft model, ONNX Runtime for this model.
    `vector` names the vector instructions (runtime/hardware.py)."""

    device: str
    no_python_tokenizer: str | None = None
    no_truncation: str | None = None
    no_prefixes: str | None = None
    no_onednn: str | None = None
    no_draft: str | None = "no draft model is named (model.draft)"
    no_onnxruntime: str | None = None
    no_jax: str | None = None
    dtype: str = "float32"
    vector: str | None = field(default_factory=hardware.vector_instructions)
    has_compiler: bool = field(default_factory=lambda: any(map(shutil.which, ("c++", "g++", "clang++"))))


Apply = Callable[[Settings], Settings]


def _available(place: Place) -> str | None:
    return None


@dataclass(frozen=True)
class Flag:
    """One optimization. `choices` maps each choice to what it changes; the first is the off arm.

    `applied` is the choice that the bare name means. `defence`: it makes hidden states harder to read, at a cost, and
    is in no set of flags. `unavailable` returns why the flag cannot be applied at a place,
    or None. `unavailable_choices` does so for single choices. `replaces` names, for a choice, the flags that do not act
    beside it; they are left out (selection.py).
    """

    name: str
    label: str
    help: str
    off_help: str
    choices: Mapping[str, Apply]
    applied: str = "on"
    sides: frozenset[Side] = frozenset(SIDES)
    fidelity: Fidelity = "exact"
    scope: Scope = "session"
    on_by_default: bool = True
    acts_when_sampling: bool = False
    defence: bool = False
    unavailable: Callable[[Place], str | None] = _available
    unavailable_choices: Mapping[str, Callable[[Place], str | None]] = field(default_factory=dict)
    replaces: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def off(self) -> str:
        """The choice that leaves the optimization out."""
        return next(iter(self.choices))

    @property
    def in_all(self) -> bool:
        """Whether the word `all` means it, too."""
        return not self.replaces and not self.defence


def _same(settings: Settings) -> Settings:
    return settings


@dataclass(frozen=True)
class Import:
    """A value by its name, as `module:attribute`, which is imported when it is applied.

    So the words of flags can be checked without torch.
    """

    name: str


def _set(**changes: object) -> Apply:
    """A choice that sets the seams named in `changes`, each in the record that has it."""

    def apply(settings: Settings) -> Settings:
        values = {
            key: resolve_name(value.name) if isinstance(value, Import) else value for key, value in changes.items()
        }
        for owner in ("load", "session", "generation"):
            record = getattr(settings, owner)
            own = {each.name: values[each.name] for each in fields(record) if each.name in values}
            settings = replace(settings, **{owner: replace(record, **own)})
        return settings

    return apply


def _on(**changes: object) -> Mapping[str, Apply]:
    """Choices off and on, where on sets the seams named in `changes`."""
    return {"off": _same, "on": _set(**changes)}


def _in_process(*calls: Callable[[], None]) -> Apply:
    """A choice that calls each of `calls` once in a process."""
    return lambda settings: replace(settings, process=(*settings.process, *calls))


def _asks_for(output: str, **changes: object) -> Mapping[str, Apply]:
    """Choices of a flag that saves the model an `output`: the off arm asks for it."""

    def ask(settings: Settings) -> Settings:
        return _set(forward_arguments={**settings.session.forward_arguments, output: True}, **changes)(settings)

    return {"off": ask, "on": _same}


def _matmul_precision(precision: str) -> Apply:
    def set_precision() -> None:
        import torch

        torch.set_float32_matmul_precision(precision)

    return _in_process(set_precision)


def _benchmark_cudnn() -> None:
    import torch

    torch.backends.cudnn.benchmark = True


def _keep(kind: Import) -> Apply:
    """A choice that changes the kind of the KV cache. Without `use_cache` there is still none."""
    return lambda settings: _set(new_cache=kind)(settings) if settings.session.new_cache else settings


def _blocks(bits: int) -> Apply:
    """A choice that stores weights in blocks of `bits`. The LM head gets at least 8: a logit is one product, where a
    hidden state is the sum of many layers' products."""

    def apply(settings: Settings) -> Settings:
        from splitlearn.layers.block_linear import in_one_memory

        layer, head = (partial(in_one_memory, each) for each in (bits, max(bits, 8)))
        return _set(
            linear=layer, head=head, token_engine=Import("splitlearn.stages.fused_decode:of"), weight_bits=bits
        )(settings)

    return apply


def _engine(made_by: str) -> Apply:
    """A choice that computes with an engine other than torch. What changes torch's layers or asks them for more does
    not act."""
    plain = {
        "attention": None,
        "sdpa": "sdpa",
        "linear": None,
        "head": None,
        "token_engine": None,
        "compile_stage": None,
    }
    return _set(engine=Import(made_by), forward_arguments={}, **plain)


def _bfloat16_rows(settings: Settings) -> Settings:
    import torch

    from splitlearn.wire.hidden_states import Plain

    return _set(wire=Plain(torch.bfloat16))(settings)


def _int8_rows(settings: Settings) -> Settings:
    from splitlearn.wire.hidden_states import Int8Blocks

    return _set(wire=Int8Blocks())(settings)


def _defence(kind: str, *shares: float) -> Mapping[str, Apply]:
    """Choices of a defence of this kind (stages/defences.py): off, or one of these shares of it."""

    def defend(share: float, settings: Settings) -> Settings:
        made = resolve_name(f"splitlearn.stages.defences:{kind}")(share)
        return _set(defences=(*settings.session.defences, made))(settings)

    return {"off": _same, **{str(share): partial(defend, share) for share in shares}}


def _looking_up(settings: Settings) -> Settings:
    from splitlearn.generation.speculation import PromptLookup

    return _set(proposers=(PromptLookup,))(settings)


def _needs_cuda(place: Place) -> str | None:
    return None if place.device.startswith("cuda") else f"needs a CUDA device; this is {place.device}"


def _needs_python_tokenizer(place: Place) -> str | None:
    return place.no_python_tokenizer


def _needs_truncation(place: Place) -> str | None:
    return place.no_truncation


def _needs_prefixes(place: Place) -> str | None:
    return place.no_prefixes


def _needs_draft_model(place: Place) -> str | None:
    return place.no_draft or place.no_truncation


def _needs_cpu(place: Place) -> str | None:
    return None if place.device == "cpu" else f"is for weights on the CPU; this is {place.device}"


def _needs_onednn(place: Place) -> str | None:
    return _needs_cpu(place) or place.no_onednn


def _needs_cpu_and_truncation(place: Place) -> str | None:
    return _needs_cpu(place) or place.no_truncation


def _needs_float32_on_cpu(place: Place) -> str | None:
    here = (place.device, place.dtype)
    return None if here == ("cpu", "float32") else f"is for float32 on the CPU; this is {place.dtype} on {place.device}"


def _needs_onnxruntime(place: Place) -> str | None:
    return place.no_onnxruntime


def _needs_jax(place: Place) -> str | None:
    return place.no_jax


OF_TORCH = (
    "cache",
    "float32_matmul_precision",
    "row_attention",
    "weight_prepack",
    "torch_compile",
    "cuda_graph",
    "head_overlap",
)
"""The flags that change torch's layers, and do nothing beside another engine."""
_NEEDS: Mapping[str, Callable[[Place], str | None]] = {"onnxruntime": _needs_onnxruntime, "jax": _needs_jax}
"""For each engine but torch, why it cannot compute at a place."""


def _needs_an_engine(place: Place) -> str | None:
    reasons = {name: needs(place) for name, needs in _NEEDS.items()}
    if not all(reasons.values()):
        return None
    return "; ".join(f"{name} {reason}" for name, reason in reasons.items())


def _needs_compiler(place: Place) -> str | None:
    return None if place.has_compiler else "needs a C++ compiler (g++ or clang++) on this machine"


FLAGS: Mapping[str, Flag] = {
    flag.name: flag
    for flag in (
        Flag(
            "low_cpu_mem_usage",
            "low_cpu_mem_usage",
            "Loads the weights without a second copy in memory.",
            "Builds the model with its own memory, reads the state dict beside it and copies it over.",
            _on(assign_weights=True),
            scope="load",
        ),
        Flag(
            "use_fast",
            "use_fast",
            "The Rust tokenizer.",
            "The Python tokenizer, if the model has one.",
            _on(use_fast_tokenizer=True),
            sides=LOCAL,
            scope="load",
            unavailable=_needs_python_tokenizer,
        ),
        Flag(
            "inference_mode",
            "inference_mode",
            "torch.inference_mode(): no autograd bookkeeping at all.",
            "torch.no_grad().",
            _on(gradient_guard=Import("torch:inference_mode")),
        ),
        Flag(
            "float32_matmul_precision",
            "float32_matmul_precision",
            'torch.set_float32_matmul_precision("medium"): float32 products may use bfloat16 units. On a CPU this '
            "concerns steps of several tokens.",
            '"highest": float32 products in full float32.',
            {level: _matmul_precision(level) for level in ("highest", "high", "medium")},
            applied="medium",
            fidelity="rounding",
            scope="process",
        ),
        Flag(
            "cudnn_benchmark",
            "cudnn.benchmark",
            "cuDNN times its algorithms and keeps the fastest.",
            "cuDNN uses its default algorithm.",
            {"off": _same, "on": _in_process(_benchmark_cudnn)},
            fidelity="rounding",
            scope="process",
            unavailable=_needs_cuda,
        ),
        Flag(
            "use_cache",
            "use_cache",
            "The KV cache: keeps keys and values, at the client for its layers, at the trunk server for the trunk's.",
            "Recomputes the whole prefix for each token. A trunk without it gets the whole prefix in each step.",
            _on(new_cache=Import("splitlearn.kvcache.layers:dynamic")),
            fidelity="rounding",
        ),
        Flag(
            "cache",
            "cache",
            "Reserved: writes keys and values into memory reserved for the whole answer. Static: also lets attention "
            "see all of that memory, masked, so that shapes never change (for torch_compile).",
            "Dynamic: copies keys and values to a longer tensor for each token. A trunk always has it reserved.",
            {
                "dynamic": _same,
                "reserved": _keep(Import("splitlearn.kvcache.layers:reserved")),
                "static": _keep(Import("splitlearn.kvcache.layers:static")),
            },
            applied="reserved",
            sides=LOCAL,
            fidelity="rounding",
        ),
        Flag(
            "prefix_cache",
            "prefix_cache",
            "Keeps what was computed of a prompt and its answer, in blocks of 16 tokens. A later request that begins "
            "with the same tokens computes only what is new. So every run of a prompt after the first, as in the lab, "
            "has the TTFT of its last tokens. It needs use_cache on every side.",
            "Computes each prompt from its first token on.",
            _on(keeps_prefixes=True),
            fidelity="rounding",
            on_by_default=False,
            unavailable=_needs_prefixes,
        ),
        Flag(
            "row_attention",
            "row_attention",
            "Computes the attention of a single token in a kernel compiled on this machine, not in torch's sdpa, on "
            "a CPU in float32. Its compiler takes 100 MB of memory in each process.",
            "Uses sdpa for any number of tokens.",
            _on(sdpa=Import("splitlearn.layers.kernel_attention:NAME")),
            fidelity="rounding",
            scope="load",
            on_by_default=False,
            unavailable=_needs_float32_on_cpu,
        ),
        Flag(
            "weight_prepack",
            "weight_prepack",
            "Stores linear layers' weights in the order in which they are read, on a CPU. onednn: in the layout of "
            "oneDNN's products. blocks: in the layout of a kernel compiled on this machine, in float32. That kernel "
            "takes one token through all layers of a stage in one call, if they are like Llama's and the cache is "
            "reserved. Its compiler takes 100 MB of memory in each process.",
            "Linear layers' weights are plain matrices.",
            {
                "off": _same,
                "onednn": _set(linear=Import("splitlearn.layers.onednn_linear:each_packed")),
                "blocks": _blocks(32),
            },
            applied="onednn",
            fidelity="rounding",
            scope="load",
            unavailable=_needs_onednn,
        ),
        Flag(
            "weight_dtype",
            "weight_dtype",
            "Rounds linear layers' weights to 4 bits (the LM head's to 8), or all to 8, with a scale and an offset for "
            "every 32 of them, on a CPU. Replaces weight_prepack and works like its blocks.",
            "Linear layers' weights have the model's dtype.",
            {"off": _same, "int8": _blocks(8), "int4": _blocks(4)},
            applied="int4",
            fidelity="lossy",
            scope="load",
            on_by_default=False,
            unavailable=_needs_cpu,
        ),
        Flag(
            "torch_compile",
            "torch.compile",
            "Compiles each stage; the compile time is shown apart. On a CPU it can take minutes. On a GPU a stage is "
            "compiled layer by layer, in seconds if layers are alike.",
            "Eager execution.",
            _on(compile_stage=Import("splitlearn.stages.compile:compile_stage")),
            fidelity="rounding",
            scope="load",
            on_by_default=False,
            unavailable=_needs_compiler,
        ),
        Flag(
            "cuda_graph",
            "cuda_graph",
            "Captures the kernels of one token's step once for a place in memory, and replays them in one call, if a "
            "trial shows that the layers permit it. Keys and values lie in reserved memory (cache). The time of a "
            "capture is shown as compile time.",
            "Launches each kernel by itself.",
            _on(token_engine=Import("splitlearn.stages.cuda_graph:of")),
            fidelity="rounding",
            scope="load",
            unavailable=_needs_cuda,
        ),
        Flag(
            "output_attentions",
            "output_attentions=False",
            "Does not ask for attention weights, so fused attention (sdpa) can be used.",
            "Asks for the attention weights of every layer, which needs the eager attention implementation.",
            _asks_for("output_attentions", attention="eager"),
            fidelity="rounding",
            scope="load",
        ),
        Flag(
            "output_hidden_states",
            "output_hidden_states=False",
            "Does not ask for hidden states between the layers.",
            "Asks for the hidden state after every layer and keeps it until the step ends.",
            _asks_for("output_hidden_states"),
        ),
        Flag(
            "fast_top_k",
            "fast_top_k",
            "Top-k sampling by torch.topk and one scatter.",
            "Top-k sampling by a full sort of the vocabulary.",
            _on(top_k=Import("splitlearn.generation.sampler:top_k_by_selection")),
            sides=LOCAL,
            acts_when_sampling=True,
        ),
        Flag(
            "prompt_lookup",
            "prompt_lookup",
            "Looks for an earlier place with the same last few tokens, in the prompt or the answer, and drafts what "
            "followed there. One step verifies several drafts. The output does not change; TPOT falls where an answer "
            "quotes.",
            "Decodes one token in each step.",
            {"off": _same, "on": _looking_up},
            sides=LOCAL,
            fidelity="rounding",
            on_by_default=False,
            unavailable=_needs_truncation,
        ),
        Flag(
            "draft_model",
            "draft_model",
            "Drafts tokens with a second, smaller model (model.draft), where prompt_lookup finds none. It is loaded "
            "whole beside the arm's own layers, with weights in 4 bits on a CPU. The output does not change.",
            "Loads no second model.",
            _on(draft_model=True),
            sides=LOCAL,
            fidelity="rounding",
            scope="load",
            on_by_default=False,
            unavailable=_needs_draft_model,
        ),
        Flag(
            "prefill_overlap",
            "prefill_overlap",
            "Sends a prompt in chunks of 256 tokens. While the trunk works on one, the client's bottom works on the "
            "next and its top on the last.",
            "Sends a prompt whole: client and trunk wait for each other.",
            _on(chunk_tokens=256),
            sides=frozenset({"client"}),
            fidelity="rounding",
            on_by_default=False,
        ),
        Flag(
            "head_overlap",
            "head_overlap",
            "Starts the next step early: after a quarter of the LM head, the likeliest token so far is sent to the "
            "trunk while the client computes the rest. Wrong guesses (about 10%) are truncated; the output does not "
            "change. On a CPU, for greedy answers that are decoded one token at a time.",
            "Starts the next step when all logits are there.",
            _on(head_overlap=True),
            sides=frozenset({"client"}),
            fidelity="rounding",
            on_by_default=False,
            unavailable=_needs_cpu_and_truncation,
        ),
        Flag(
            "wire_dtype",
            "wire_dtype",
            "Sends hidden states as int8 with a bfloat16 scale for every 64 values of a row (0.26 of the bytes), or as "
            "bfloat16 (half of them).",
            "Sends hidden states as they are computed: in float32 if the model is.",
            {
                "float32": _same,
                "bfloat16": _bfloat16_rows,
                "int8": _int8_rows,
            },
            applied="int8",
            sides=frozenset({"trunk"}),
            fidelity="lossy",
            on_by_default=False,
        ),
        Flag(
            "gaussian_noise",
            "gaussian_noise",
            "Adds Gaussian noise to the hidden states that the client sends. Its standard deviation is 0.3, 0.1 or "
            "1.0 of each state's own, by the median magnitude. It follows from the request's seed, which has to be "
            "secret. This is not private: docs/privacy.md has what attacks read all the same.",
            "Sends hidden states without noise.",
            _defence("GaussianNoise", 0.1, 0.3, 1.0),
            applied="0.3",
            sides=frozenset({"client"}),
            fidelity="lossy",
            on_by_default=False,
            defence=True,
        ),
        Flag(
            "topk_sparsification",
            "topk_sparsification",
            "Keeps a quarter, a half or a tenth of the values of each hidden state that the client sends, those with "
            "the largest magnitude. The others are sent as zeros, in as many bytes. This is not private: "
            "docs/privacy.md has what attacks read all the same.",
            "Sends all values of hidden states.",
            _defence("TopK", 0.5, 0.25, 0.1),
            applied="0.25",
            sides=frozenset({"client"}),
            fidelity="lossy",
            on_by_default=False,
            defence=True,
        ),
        Flag(
            "engine",
            "engine",
            "Computes with ONNX Runtime, for which each stage is exported once, or with JAX, which compiles each stage "
            "when its first step comes. Flags that change torch's layers then do not act: "
            f"{', '.join(OF_TORCH)}; with JAX weight_dtype, too.",
            "Computes with torch.",
            {
                "torch": _same,
                "onnxruntime": _engine("splitlearn.engines.onnx_engine:of"),
                "jax": _engine("splitlearn.engines.jax_stage:of"),
            },
            applied="onnxruntime",
            fidelity="rounding",
            scope="load",
            on_by_default=False,
            unavailable=_needs_an_engine,
            unavailable_choices=_NEEDS,
            replaces={"onnxruntime": frozenset(OF_TORCH), "jax": frozenset((*OF_TORCH, "weight_dtype"))},
        ),
    )
}


def settings(applied: frozenset[str]) -> Settings:
    """The seams for a side's applied flags, each `name` or `name=choice`; every flag not named is at its off arm."""
    chosen = dict(_split(text) for text in applied)
    from splitlearn.generation.settings import GenerationSettings
    from splitlearn.stages.settings import LoadSettings, SessionSettings

    result = Settings((), LoadSettings(), SessionSettings(applied), GenerationSettings())
    for flag in FLAGS.values():
        result = flag.choices[chosen.get(flag.name, flag.off)](result)
    return result


def of_scope(applied: frozenset[str], *scopes: Scope) -> frozenset[str]:
    """Those of `applied` whose flag has one of `scopes`."""
    return frozenset(text for text in applied if FLAGS[_split(text)[0]].scope in scopes)


def _split(text: str) -> tuple[str, str]:
    """`name` or `name=choice` as (name, choice)."""
    name, _, choice = text.partition("=")
    return name, choice or FLAGS[name].applied
