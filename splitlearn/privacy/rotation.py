"""A defence without a flag: a secret rotation of the hidden states between client and trunk.

The norms of these families commute with a rotation Q once their weights are folded into the linear layers behind them.
So a trunk whose layers read through Q and write through its transpose computes the same from states xQ, and sends back
states that the client turns back (Ashkboos et al. 2024, "SliceGPT", arXiv:2401.15024).

It hides nothing from a server that has the public checkpoint: the rotated weights, which it must have to compute, are
those of the checkpoint times Q, and say what Q is (`recovered`).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from splitlearn.checkpoints.folder import ModelFacts
from splitlearn.errors import InputError
from splitlearn.models.cut import CutModel, layers_of

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Their layers have RMSNorms before attention and MLP alone, and these linear layers."""
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""The norms, and the layers that read what each gives."""
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def rotated_trunk(cut: CutModel, facts: ModelFacts, seed: int) -> Tensor:
    """Rotate the trunk `cut` by a Q [H, H] of this seed, and return that. Raises InputError for a model that a rotation
    would change."""
    if facts.model_type not in FAMILIES:
        raise InputError("defences", "rotation", f"a model of: {', '.join(FAMILIES)}; this is {facts.model_type}")
    q = orthogonal(facts.hidden_size, seed)
    rotate(cut, q)
    return q


def orthogonal(size: int, seed: int) -> Tensor:
    """A random rotation Q [size, size] in float64, uniform over all (Haar; Mezzadri 2007, arXiv:math-ph/0609050)."""
    normal = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(normal)
    q *= r.diagonal().sign()
    assert isinstance(q, Tensor)
    return q


def turned(x: Tensor, q: Tensor) -> Tensor:
    """`x` [..., H] times `q`, in the dtype of `x`."""
    return (x.double() @ q).to(x.dtype)


@torch.no_grad()
def rotate(cut: CutModel, q: Tensor) -> None:
    """Let the layers of `cut` take states times `q`, and give such."""
    for layer in layers_of(cut):
        for norm, weights in _readers(layer):
            for weight in weights:
                weight.data = turned(weight * norm, q)
            norm.data = torch.ones_like(norm)
        for name in WRITERS:
            for written in layer.get_submodule(name).parameters():  # [H, in], and a bias [H]
                written.data = (q.T @ written.double()).to(written.dtype)


@torch.no_grad()
def recovered(public: CutModel, own: CutModel) -> Tensor:
    """The Q of a rotated trunk `own`, by the `public` one: that for which the public weights times Q are
    the closest to the rotated ones (Schönemann 1966, "A generalized solution of the orthogonal Procrustes problem")."""
    pairs = zip(_read(public), _read(own), strict=True)
    square = sum((before.T @ after for before, after in pairs), torch.zeros((), dtype=torch.float64))
    left, _, right = torch.linalg.svd(square)
    return torch.matmul(left, right)


def _readers(layer: nn.Module) -> list[tuple[Tensor, list[Tensor]]]:
    """The weights of the norms [H], each with those of the layers that read what it gives [out, H]."""
    return [
        (layer.get_parameter(f"{norm}.weight"), [layer.get_parameter(f"{name}.weight") for name in names])
        for norm, names in READERS.items()
    ]


def _read(cut: CutModel) -> Iterator[Tensor]:
    """The weights [out, H] through which the layers read states, with the norms' in them, in float64."""
    for layer in layers_of(cut):
        yield from ((weight * norm).double() for norm, weights in _readers(layer) for weight in weights)
