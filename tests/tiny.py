"""Small models with random weights and a real tokenizer, made on the spot: what tests use where no weights are needed.

`make_checkpoint` writes a folder as from a hub, `make_converted` one in the format of splitlearn/store.py.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from splitlearn import convert, store
from splitlearn.progress import silent
from splitlearn.store import ModelFiles

CHAT_TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TEXT = (
    "The sky is blue because air scatters short waves of light more than long ones.",
    "A model is cut into three parts: the client keeps the first and the last layers.",
    "Größe, façade, naïve, 日本語, русский, emoji 🙂🚀 and e\u0301 combined.",
)
# What a model type needs beyond the common sizes to be small and still itself.
_OWN: dict[str, dict[str, object]] = {
    "mistral": {"sliding_window": 16},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 16},
    "phi3": {"pad_token_id": 0},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 48},
}


def make_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 400 tokens; ends a text with `<|end|>`."""
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
    """Those of `sizes` that this type's configuration has: any other would be kept, and say untrue things."""
    usual = AutoConfig.for_model(model_type)
    names = set(vars(usual)) | set(usual.attribute_map)
    return {name: value for name, value in sizes.items() if name in names}


def make_converted(
    folder: Path, model_type: str = "llama", n_layers: int = 6, chat: bool = True, **own: object
) -> ModelFiles:
    """As `make_checkpoint`, converted into `folder`: `prepare` takes that folder's path as a model name as it is."""
    checkpoint = make_checkpoint(folder.with_name(f"{folder.name}-checkpoint"), model_type, n_layers, chat, **own)
    folder.mkdir()
    facts = convert.convert(checkpoint, folder, None, silent)
    store.seal(folder, str(checkpoint), facts, silent)
    return store.open_folder(folder, str(folder))
