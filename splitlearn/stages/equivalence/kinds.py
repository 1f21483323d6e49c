"""The kinds of a configuration: the values that decide how its model computes. A family is tested for its kinds.

`python -m splitlearn.stages.equivalence` tests the default configuration of a family. A model with another kind of
layer, of rotary positions, or of anything in WORDS is tested when it is loaded.
"""

from typing import Any

from splitlearn.stages.equivalence.tiny import dicts, per_layer

WORDS = (
    *("window", "chunk", "local", "context", "block", "dilat", "stride"),
    *("rope", "rotary", "position", "alibi", "bias", "mrope"),
    *("attention", "attn", "softcap", "soft_cap", "sink", "temperature", "scale", "scaling", "floor", "topk", "index"),
    *("cache", "causal", "conv"),
)
"""Parts of the names of attributes that decide which tokens a token attends to, or its position."""
SILENT = ("attention_dropout", "attn_implementation", "cache_dir")
"""Attributes with such a name that do not change an answer."""


def kinds(config: Any) -> set[str]:
    """The kinds of this configuration, as "name: value"."""
    text = config.get_text_config(decoder=True)
    return _layers(text) | _rotary(text) | _own(text)


def _layers(config: Any) -> set[str]:
    """The entries of the lists that have one for each layer."""
    return {f"{name}: {entry}" for name, entries in per_layer(config).items() for entry in entries}


def _rotary(config: Any) -> set[str]:
    """The types of rotary positions, and the names of their parameters other than the base."""
    found = set()
    for rotary in dicts(getattr(config, "rope_parameters", None)):
        own = [name for name, value in rotary.items() if value is not None and not isinstance(value, dict)]
        found |= {f"rope_parameters: {name}" for name in own if name not in ("rope_theta", "rope_type")}
        found |= {f"rope_type: {rotary['rope_type']}"} if "rope_type" in own else set()
    return found


def _own(config: Any) -> set[str]:
    """Other differences from the default configuration of the class. Of a number only its presence counts."""
    usual, lists = vars(type(config)()), per_layer(config)
    names = [name for name in vars(config) if any(word in name for word in WORDS) and not name.startswith("_")]
    return {
        f"{name}: {_word(value)}"
        for name in names
        if name not in lists
        and not any(word in name for word in SILENT)
        and _word(value := getattr(config, name)) != _word(usual.get(name))
    }


def _word(value: Any) -> str:
    """A word for a value, without its size. Absent and off are both "none"."""
    if isinstance(value, bool | str):
        return str(value) if value else "none"
    return "some" if value else "none"
