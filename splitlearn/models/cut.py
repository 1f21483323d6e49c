"""Cut a transformers causal LM into stages, and run a stage for one step.

    plan = SplitPlan.of(None, None, n_layers)                      # [2, n - 2): models/plan.py
    bottom = carve(model, 0, plan.start, first=True, last=False)   # token ids in, hidden state out
    hidden = forward(bottom, token_ids, position=0, cache=DynamicCache())

The layers stay transformers' own, and so do masks, rotary positions (but see models/rope.py) and cache: a cut model is
the model with fewer layers. What runs before the layers (embedding, scaling, learned positions, a norm) belongs to the
first stage alone; on every other stage the hidden state is handed to the first layer as it came, past whatever the
model does there.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from splitlearn.errors import InputError
from splitlearn.models import rope
from splitlearn.models.structure import Structure, join, structure_of

LAYER_NUMBERS = ("layer_idx", "layer_id")
"""Attributes by which a layer knows its place in the cache."""


@dataclass(frozen=True)
class CutModel:
    """The layers `[start, end)` of a model, with the embeddings if `first` and the norm and the head if `last`.

    `module` is the causal LM on a last stage and otherwise the module that owns the layers. It may be moved, compiled
    or given weights like any module; it runs one call at a time.
    """

    module: nn.Module
    structure: Structure
    """Of the whole model."""
    start: int
    end: int
    first: bool
    last: bool
    accepts: frozenset[str]
    """Those of position_ids and logits_to_keep that the module's forward takes."""
    tied: Mapping[str, str]
    """Full names of parameters that are another one's values: tied name -> the name of the one that is stored."""
    compiled: Literal["", "whole", "by layers"] = ""
    """What of it goes through torch.compile when it is called (stages/compile.py)."""

    @cached_property
    def configs(self) -> tuple[Any, ...]:
        """The configurations that its modules look things up in, each once."""
        found = {id(config): config for module in self.module.modules() if (config := getattr(module, "config", None))}
        return tuple(found.values())

    def full_name(self, name: str) -> str:
        """The name in the whole model's state dict of the stage's parameter or buffer `name`.

        A tied head has the embedding's name, so that two stages which share a tensor can be seen to share it.
        """
        name = name if self.last else join(self.structure.body, name)
        prefix = self.structure.layers + "."
        if name.startswith(prefix):
            index, _, rest = name.removeprefix(prefix).partition(".")
            name = f"{prefix}{int(index) + self.start}.{rest}"
        return self.tied.get(name, name)


def carve(model: Any, start: int, end: int, *, first: bool, last: bool) -> CutModel:
    """Cut a whole causal LM, in place, down to the layers `[start, end)`.

    The model may be on the meta device. `first`: the stage takes token ids; otherwise hidden states. `last`: the stage
    gives logits; otherwise hidden states. `start == end` is a stage of no layers: the embeddings alone with `first`,
    the norm and the head alone with `last`. The caller's configuration is left as it is.

    Raises InputError for layers that the model does not have, FamilyRefused for a structure that cannot be read.
    """
    structure = structure_of(model)
    _check_range(start, end, structure.n_layers, first=first, last=last)
    tied = dict(getattr(model, "all_tied_weights_keys", {}))
    rope.make_pure(model)
    layers = _keep_layers(model, structure, start, end)
    if not last:
        for path in _present(structure.norm, *structure.after):
            _replace(model, path, _Same())
    if not first:
        _skip_entrance(model, structure, layers)
    module = model if last else model.get_submodule(structure.body)
    return CutModel(module, structure, start, end, first, last, _accepted(module), tied)


def forward(
    stage: CutModel,
    x: Tensor,
    position: int | Tensor,
    cache: Any | None,
    *,
    logits_to_keep: int | Tensor = 0,
    arguments: Mapping[str, Any] | None = None,
    parts: Sequence[rope.Part] = (),
) -> Tensor:
    """One step of a stage: token ids int64 [1, T], or a hidden state [1, T, H], to a hidden state or logits [1, T, V].

    `position` is the number of tokens before this step, an int or int64 []; or the position of each token, int64 [T].
    `cache` is a transformers cache of this stage's own that holds `position` tokens and is extended in place, or None:
    then x is the whole prefix and `position` is 0. `logits_to_keep` asks a last stage for the logits of that many last
    tokens, 0 for all of them; or for those of the tokens with these numbers, int64 [k]. `arguments` go to the model's
    forward as they are, such as output_attentions=True. `parts` are the sequences of the tokens, by whose lengths
    rotary embeddings are made (models/rope.py). Without them the length is that which this step ends at.
    """
    module = stage.module
    call: dict[str, Any] = {"past_key_values": cache, "use_cache": cache is not None, **(arguments or {})}
    call["input_ids" if stage.first else "inputs_embeds"] = x
    if "position_ids" in stage.accepts:
        if isinstance(position, int) or not position.dim():
            position = torch.arange(x.shape[1], device=x.device).add(position)
        call["position_ids"] = position.unsqueeze(0)
    if stage.last and "logits_to_keep" in stage.accepts:
        call["logits_to_keep"] = logits_to_keep
    with rope.computing(parts):
        output = module(**call)
    if not stage.last:
        return cast(Tensor, output.last_hidden_state)
    logits: Tensor = output.logits
    if isinstance(logits_to_keep, int):
        return logits[:, -logits_to_keep:]
    return logits if "logits_to_keep" in stage.accepts else logits[:, logits_to_keep]


@contextmanager
def eagerly(cut: CutModel) -> Iterator[None]:
    """Inside, a stage that is compiled runs as it was: hooks act, and nothing is compiled for what is only tried."""
    with torch.compiler.set_stance("force_eager") if cut.compiled else nullcontext():
        yield


def example(cut: CutModel, tokens: int) -> Tensor:
    """Something to try a stage with: token ids [1, tokens] or a hidden state [1, tokens, H], always the same."""
    weight = _floating(cut)
    made = torch.Generator().manual_seed(0)
    if cut.first:
        return torch.randint(8, (1, tokens), generator=made).to(weight.device)
    hidden: int = body_of(cut).config.get_text_config().hidden_size
    return (0.1 * torch.randn(1, tokens, hidden, generator=made)).to(weight.device, weight.dtype)


def dtype_of(cut: CutModel) -> torch.dtype:
    """The dtype in which the stage computes."""
    return _floating(cut).dtype


def _floating(cut: CutModel) -> nn.Parameter:
    return next(parameter for parameter in cut.module.parameters() if parameter.is_floating_point())


def layers_of(cut: CutModel) -> nn.ModuleList:
    """The stage's own layers. The module of a stage that is not the last is the body alone."""
    path, body = cut.structure.layers, cut.structure.body
    return cast(nn.ModuleList, body_of(cut).get_submodule(path.removeprefix(f"{body}.")))


def body_of(cut: CutModel) -> Any:
    """The stage's module without the LM head."""
    return cut.module.get_submodule(cut.structure.body) if cut.last else cut.module


def _accepted(module: nn.Module) -> frozenset[str]:
    """What the class's forward says it takes; a forward that takes any keyword hands position_ids on."""
    parameters = inspect.signature(type(module).forward).parameters
    named = {"position_ids", "logits_to_keep"} & set(parameters)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return frozenset(named | {"position_ids"} if takes_any else named)


def _check_range(start: int, end: int, n_layers: int, *, first: bool, last: bool) -> None:
    if not 0 <= start <= end <= n_layers:
        raise InputError("layers", f"[{start}, {end})", f"a range within [0, {n_layers})")
    if start == end and not (first or last):
        raise InputError("layers", f"[{start}, {end})", "at least one layer between the first stage and the last")


def _keep_layers(model: Any, structure: Structure, start: int, end: int) -> nn.ModuleList:
    """Slice the layers, number them from 0, as the stage's own cache does, and make the configuration say so."""
    layers = nn.ModuleList(list(model.get_submodule(structure.layers))[start:end])
    _replace(model, structure.layers, layers)
    for module, name in itertools.product(layers.modules(), LAYER_NUMBERS):
        if isinstance(number := getattr(module, name, None), int):
            setattr(module, name, number - start)
    body = model.get_submodule(structure.body)
    for config in {id(c): c for c in (model.config, body.config)}.values():
        _give_config(model, config, _sliced(config, start, end, structure.n_layers))
    return layers


def _sliced(config: Any, start: int, end: int, n_layers: int) -> Any:
    """A copy of a configuration for the layers `[start, end)`; a list with an entry for each layer is sliced."""
    own = copy.deepcopy(config)
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, (list, tuple)) and len(value) == n_layers:
            setattr(own, name, value[start:end])
    own.num_hidden_layers = end - start
    return own


def _give_config(model: nn.Module, old: Any, new: Any) -> None:
    """Layers look up their own entry by layer_idx, so that every module needs the configuration that matches it."""
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new


def _skip_entrance(model: Any, structure: Structure, layers: nn.ModuleList) -> None:
    """Drop what only the first stage needs, and hand `inputs_embeds` untouched to the first layer, norm or head."""
    for path in (structure.embedding, *structure.before):
        replaced = model.get_submodule(path)
        _replace(model, path, _Nothing() if isinstance(replaced, nn.Embedding) else _Same())
    after = [model.get_submodule(path) for path in _present(structure.norm, *structure.after)]
    entrance = _Entrance()
    model.get_submodule(structure.body).register_forward_pre_hook(entrance.at_body, with_kwargs=True)
    target: nn.Module = [*layers, *after, model.get_output_embeddings()][0]
    target.register_forward_pre_hook(entrance.at_target, with_kwargs=True)


class _Nothing(nn.Module):
    """Stands where a table of embeddings was: adds nothing to a hidden state and holds no weight."""

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        return torch.zeros((), device=_tensor_of(arguments, named).device)


class _Same(nn.Module):
    """Stands where a norm or a projection was: gives back the tensor that it was called with."""

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        return _tensor_of(arguments, named)


def _tensor_of(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """The first tensor that a call was given."""
    return next(value for value in (*arguments, *named.values()) if isinstance(value, Tensor))


class _Entrance:
    """Carries the hidden state of one call from the entry of the body to its first layer."""

    def __init__(self) -> None:
        self.hidden: Tensor | None = None

    def at_body(
        self, module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Remember the hidden state [1, T, H] that came in; the body gets a copy, since ctrl scales it in place."""
        self.hidden = named["inputs_embeds"]
        return positional, {**named, "inputs_embeds": named["inputs_embeds"].clone()}

    def at_target(
        self, module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put it in the place of the hidden state that the body made of it, once in a call."""
        hidden, self.hidden = self.hidden, None
        if hidden is None:
            return positional, named
        if positional:
            return (hidden, *positional[1:]), named
        return positional, {**named, "hidden_states": hidden}


def _present(*paths: str | None) -> list[str]:
    return [path for path in paths if path is not None]


def _replace(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)
