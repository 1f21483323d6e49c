"""Makes small models with random weights and a real tokenizer, for tests that need no trained weights.

`make_checkpoint` writes a folder like one from a hub. `make_converted` writes the format of
splitlearn/checkpoints/folder.py.
"""

import json
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from splitlearn.checkpoints import convert
from splitlearn.checkpoints.folder import ModelFiles, open_folder, seal
from splitlearn.runtime.progress import silent

CHAT_TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PRODUCTS = f"{{% set x = 10 ** (100000 * messages | length) %}}{'{% set x = x * x %}' * 30}"
"""A template that computes for hours, in products of long integers, which no signal's handler interrupts."""
HOARD = "{{ 'a' * (10000000000 * messages | length) }}"
_TEXT = (
    "The sky is blue because air scatters short waves of light more than long ones.",
    "A model is cut into three parts: the client keeps the first and the last layers.",
    "Größe, façade, naïve, 日本語, русский, emoji 🙂🚀 and e\u0301 combined.",
)
# Further settings that a model type needs to be small and keep its own features.
_OWN: dict[str, dict[str, object]] = {
    "mistral": {"sliding_window": 16},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 16},
    "phi3": {"pad_token_id": 0},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 48},
}


def make_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 400 tokens. `<|end|>` ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    if chat:
        wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_checkpoint(
    folder: Path, model_type: str = "llama", n_layers: int = 6, chat: bool = True, **own: object
) -> Path:
    """A checkpoint of `model_type`: hidden size 48, 4 heads (2 for keys and values), 512 positions, tied head.

    `own` are values of its configuration.
    """
    tokenizer = make_tokenizer(chat)
    sizes: dict[str, object] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,  # wide enough that greedy tokens vary
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = AutoConfig.for_model(model_type, **{**_known(model_type, sizes), **_OWN.get(model_type, {}), **own})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _known(model_type: str, sizes: dict[str, object]) -> dict[str, object]:
    """Those of `sizes` that this type's configuration has. It would store any other without using it."""
    usual = AutoConfig.for_model(model_type)
    names = set(vars(usual)) | set(usual.attribute_map)
    return {name: value for name, value in sizes.items() if name in names}


def make_converted(
    folder: Path, model_type: str = "llama", n_layers: int = 6, chat: bool = True, **own: object
) -> ModelFiles:
    """As `make_checkpoint`, converted into `folder`. `prepare` accepts the folder's path as a model name."""
    checkpoint = make_checkpoint(folder.with_name(f"{folder.name}-checkpoint"), model_type, n_layers, chat, **own)
    folder.mkdir()
    facts = convert.convert(checkpoint, folder, None, silent)
    seal(folder, str(checkpoint), facts, silent)
    return open_folder(folder, str(folder))


def make_hostile(folder: Path) -> ModelFiles:
    """As `make_converted`. Its chat template computes without end for a prompt with PRODUCTS in it, and takes all
    memory for one with HOARD."""
    files = make_converted(folder)
    bad = f"{{% if 'PRODUCTS' in messages[-1].content %}}{PRODUCTS}{{% elif 'HOARD' in messages[-1].content %}}{HOARD}"
    (folder / "chat_template.jinja").write_text(f"{bad}{{% endif %}}{CHAT_TEMPLATE}", encoding="utf-8")
    seal(folder, files.source, files.facts, silent)
    return open_folder(folder, str(folder))


def make_gguf(path: Path, checkpoint: Path) -> Path:
    """The llama model of `checkpoint`, made by make_checkpoint, as a GGUF file in float32 with its tokenizer inside."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=False)
    config, writer = model.config, GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, checkpoint)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            writer.add_tensor(_gguf_name(name), _gguf_order(name, tensor, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: GGUFWriter, checkpoint: Path) -> None:
    data = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = sorted(data["model"]["vocab"].items(), key=lambda entry: int(entry[1]))
    special = {token["content"] for token in data["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in special else 1 for token, _ in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in data["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)


def _gguf_name(name: str) -> str:
    """llama.cpp's name for a tensor of a Llama."""
    renamed = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers": "blk",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
    }
    for ours, theirs in renamed.items():
        name = name.replace(ours, theirs)
    return name


def _gguf_order(name: str, tensor: torch.Tensor, config: Any) -> Any:
    """The tensor in llama.cpp's order. llama.cpp rotates neighbouring rows of queries and keys, transformers halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor.numpy()
    rows = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2)
    return rows.reshape(tensor.shape).contiguous().numpy()
