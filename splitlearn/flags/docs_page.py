"""docs/flags.md, generated from the registry: `python -m splitlearn flags --markdown`."""

from collections.abc import Iterable

from splitlearn.flags.auto import RULES
from splitlearn.flags.registry import FLAGS, SIDES, Flag, Place
from splitlearn.flags.selection import PRESETS

_HEAD = """# Optimization flags

Generated from splitlearn/flags/registry.py by `make docs`; do not edit.

A flag is one optimization, or a defence that makes hidden states harder to read ([privacy.md](privacy.md)). It is
*applied*, or it is at its *off arm*: what a person who does not know the flag would write. Each side chooses for
itself. `full` is the whole model in one process, `client` the bottom and the top of a split model, `trunk` the layers
between, at the server.

- Fidelity: **exact** flags give bit-equal logits. **rounding** flags add in another order, so logits differ by
  rounding. **lossy** flags change the numbers on purpose, so full and split may give other tokens; only `all` or their
  name applies them.
- Scope: a **session** flag is chosen with each generation. **load** and **process** flags need a process of their own.

This table has flags by side. `python -m splitlearn flags` and the page show the same for your machine, model and trunk
server: applied, available, or unavailable and why.
"""

# A place that lacks everything, so that each flag says what it needs.
_POOREST = Place(
    "cpu",
    no_python_tokenizer="the model has only one tokenizer, Rust or Python",
    no_truncation="the model has layers that keep something else than keys and values",
    no_prefixes="the model has layers that keep something else, or rotary embeddings that change with the length",
    no_onnxruntime="is not installed, or does not compute this model, dtype or device",
    no_jax="is not installed, or does not compute this model, dtype or device",
    has_compiler=False,
)

_SELECT = """
## Choosing flags

In `config.yaml` (`flags:`), on the command line (`--flags`) and on the page the words are the same:

- `auto`, which is applied at first: the fastest set that leaves the tokens as they are, on each side by this rule:
{rules};
- `default`: every available exact or rounding flag but {left_out};
- `all`: every available flag but {not_in_all}; `none`;
- a list: `use_cache,inference_mode`; another choice of a flag: `float32_matmul_precision=high`;
- one of these for each side: `full:all client:use_cache trunk:none`; a side that is not named has the default;
- a preset:
"""


def markdown() -> str:
    """The whole page."""
    table = ["| flag | fidelity | scope | full | client | trunk | unavailable when |", "| --- " * 7 + "|"]
    table += [_row(flag) for flag in FLAGS.values()]
    details = [_section(flag) for flag in FLAGS.values()]
    presets = [f"  - `{name}`: {words}" for name, (words, _) in PRESETS.items()]
    left_out = _in_words(flag for flag in FLAGS.values() if flag.fidelity != "lossy" and not flag.on_by_default)
    not_in_all = _in_words(flag for flag in FLAGS.values() if not flag.in_all)
    rules = "\n".join(f"  - {rule.when}: `{rule.preset}`" for rule in RULES)
    select = _SELECT.format(rules=rules, left_out=left_out, not_in_all=not_in_all)
    return "\n".join([_HEAD, *table, "", *details]) + select + "\n".join(presets) + "\n"


def _in_words(flags: Iterable[Flag]) -> str:
    """Their names as a list in words."""
    *most, last = [f"`{flag.name}`" for flag in flags]
    return f"{', '.join(most)} and {last}"


def _row(flag: Flag) -> str:
    state = "in `default`" if flag.on_by_default else "available"
    sides = [state if side in flag.sides else "does not act" for side in SIDES]
    reason = flag.unavailable(_POOREST) or ""
    return f"| `{flag.name}` | {flag.fidelity} | {flag.scope} | {' | '.join(sides)} | {reason} |"


def _section(flag: Flag) -> str:
    others = [choice for choice in flag.choices if choice not in (flag.off, flag.applied)]
    lines = [f"### {flag.label}", "", f"- Applied: {flag.help}", f"- Off: {flag.off_help}"]
    if others:
        lines.append(f"- Other choices: {', '.join(f'`{flag.name}={choice}`' for choice in others)}.")
    return "\n".join([*lines, ""])
