"""Where the parts of a model are, read off its structure."""

from typing import Any

import pytest
from torch import nn
from transformers import AutoConfig

from splitlearn.errors import FamilyRefused
from splitlearn.models.structure import Structure, structure_of
from splitlearn.stages.equivalence.tiny import tiny_config, tiny_model


def structure(family: str) -> Structure:
    return structure_of(tiny_model(tiny_config(AutoConfig.for_model(family), grouped=False)))


@pytest.mark.parametrize(
    ("family", "layers", "embedding", "norm"),
    [
        ("gpt2", "transformer.h", "transformer.wte", "transformer.ln_f"),
        ("llama", "model.layers", "model.embed_tokens", "model.norm"),
        ("gpt_neox", "gpt_neox.layers", "gpt_neox.embed_in", "gpt_neox.final_layer_norm"),
        ("opt", "model.decoder.layers", "model.decoder.embed_tokens", "model.decoder.final_layer_norm"),
        ("bloom", "transformer.h", "transformer.word_embeddings", "transformer.ln_f"),
        ("lfm2", "model.layers", "model.embed_tokens", "model.embedding_norm"),
    ],
)
def test_layers_embedding_and_final_norm_are_found(family: str, layers: str, embedding: str, norm: str) -> None:
    found = structure(family)
    assert (found.layers, found.embedding, found.norm) == (layers, embedding, norm)
    assert found.n_layers == 6


def test_what_runs_between_embedding_and_layers_is_the_first_stages() -> None:
    assert structure("gpt2").before == ("transformer.wpe",)
    assert structure("bloom").before == ("transformer.word_embeddings_layernorm",)
    assert structure("opt").before == ("model.decoder.embed_positions", "model.decoder.project_in")
    assert structure("llama").before == ()


def test_a_projection_after_the_norm_is_the_last_stages() -> None:
    assert structure("opt").after == ("model.decoder.project_out",)


def test_a_list_of_as_many_experts_is_not_taken_for_the_layers() -> None:
    config = tiny_config(AutoConfig.for_model("llama"), grouped=True)
    model: Any = tiny_model(config)
    for layer in model.model.layers:
        layer.mlp.experts = nn.ModuleList(nn.Linear(64, 6400) for _ in range(6))
    assert structure_of(model).layers == "model.layers"


def test_a_model_without_a_list_of_its_layers_is_refused() -> None:
    model: Any = tiny_model(tiny_config(AutoConfig.for_model("llama"), grouped=True))
    model.config.num_hidden_layers = 7
    with pytest.raises(FamilyRefused, match="no list of its 7 layers"):
        structure_of(model)
