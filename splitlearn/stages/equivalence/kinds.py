"""What of a configuration decides how its model computes: a family is proven for that, and not for its name.

The default configuration of a family is what `python -m splitlearn.stages.equivalence` runs. A model whose
configuration has a kind of layer, of rotary positions, or of anything else in WORDS that the default has not, is tried
when it is loaded.
"""

from typing import Any

from splitlearn.stages.equivalence.tiny import dicts, per_layer

WORDS = (
    *("window", "chunk", "local", "context", "block", "dilat", "stride"),
    *("rope", "rotary", "position", "alibi", "bias", "mrope"),
    *("attention", "attn", "softcap", "soft_cap", "sink", "temperature", "scale", "scaling", "floor", "topk", "index"),
    *("cache", "causal", "conv"),
)
"""In the names of attributes that tell how a token sees others, or where it stands."""
SILENT = ("attention_dropout", "attn_implementation", "cache_dir")
"""Attributes with such a name that change nothing when a model answers."""


def kinds(config: Any) -> set[str]:
    """What decides how a model with this configuration computes, as "name: value"."""
    text = config.get_text_config(decoder=True)
    return _layers(text) | _rotary(text) | _own(text)


def _layers(config: Any) -> set[str]:
    """What the lists with an entry for each layer say."""
    return {f"{name}: {entry}" for name, entries in per_layer(config).items() for entry in entries}


def _rotary(config: Any) -> set[str]:
    """The types of rotary positions, and which parameters they have beside the usual one."""
    found = set()
    for rotary in dicts(getattr(config, "rope_parameters", None)):
        own = [name for name, value in rotary.items() if value is not None and not isinstance(value, dict)]
        found |= {f"rope_parameters: {name}" for name in own if name not in ("rope_theta", "rope_type")}
        found |= {f"rope_type: {rotary['rope_type']}"} if "rope_type" in own else set()
    return found


def _own(config: Any) -> set[str]:
    """In what else the configuration differs from its class's default one: a number counts as there or not there."""
    usual, lists = vars(type(config)()), per_layer(config)
    names = [name for name in vars(config) if any(word in name for word in WORDS) and not name.startswith("_")]
    return {
        f"{name}: {_told(value)}"
        for name in names
        if name not in lists
        and not any(word in name for word in SILENT)
        and _told(value := getattr(config, name)) != _told(usual.get(name))
    }


def _told(value: Any) -> str:
    """A word for a value: its size does not matter, and what is not there is none, as is what is off."""
    if isinstance(value, bool | str):
        return str(value) if value else "none"
    return "some" if value else "none"
