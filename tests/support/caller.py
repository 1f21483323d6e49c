"""Makes a small model that calls tools: its chat template has them, and each of its tokens decides the next one.

Its layers add nothing, so the LM head sees the last token's embedding; its rows are the embeddings of the tokens
before. The template's last token, which depends on the conversation, thus decides the whole answer. Where a grammar
forbids the next one, the tokens of CLOSING end what is open, at a temperature of 1, too.
"""

from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from splitlearn.checkpoints import convert
from splitlearn.checkpoints.folder import ModelFiles, open_folder, seal
from splitlearn.runtime.progress import silent
from tests.support.tiny import make_tokenizer

CHAT_TEMPLATE = """
{%- if tools %}<|system|>Tools:{% for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}<|end|>{% endif %}
{%- for message in messages %}<|{{ message.role }}|>{% if message.tool_calls %}<|call|>{% endif %}{{ message.content }}
{%- for call in message.tool_calls %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}{% endfor %}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>
{%- if messages[-1].role == 'tool' %}<|after|>{% elif tools %}<|call|>{% endif %}{% endif %}"""
CALLS = (("look", '{"place": "sky"}'), ("look", '{"place": "sea"}'))
TEXT, AFTER, PLAIN = "Let me look.", "Both are blue.", "I cannot look."
CLOSING = {'"': 40.0, "}": 44.0}
"""Tokens and their logits: above all but a following token's, which is about 64."""
_SPECIAL = ("<|end|>", "<|user|>", "<|system|>", "<|tool|>", "<|assistant|>", "<|after|>", "<|call|>")
_ANSWERS = (
    ("<|assistant|>", PLAIN, "<|end|>"),
    ("<|after|>", AFTER, "<|end|>"),
    (
        *("<|call|>", TEXT, "\n<tool_call>\n", '{"name": "look", ', '"arguments": {"place": "sky"}}', "\n</tool_call>"),
        *("\n<tool_call>\n\n", '{"name": "look", "arguments": {"place": ', '"sea"}}', "\n</tool_call>\n", "<|end|>"),
    ),
)


def make_caller(folder: Path) -> ModelFiles:
    """A converted Llama of 4 layers that says PLAIN, with tools TEXT and then CALLS, and AFTER a result."""
    checkpoint, tokenizer = folder.with_name(f"{folder.name}-checkpoint"), _tokenizer()
    model = AutoModelForCausalLM.from_config(_config(tokenizer))
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                weights.zero_()
        embedded = model.get_input_embeddings().weight
        embedded.copy_(torch.randn(embedded.shape, generator=torch.Generator().manual_seed(1)))
        embedded[:, 0] = 1.0
        for token, logit in CLOSING.items():
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(token), 0] = logit
        for answer in _ANSWERS:
            ids = tokenizer.convert_tokens_to_ids(list(answer))
            for token, following in zip(ids, ids[1:], strict=False):
                model.lm_head.weight[following] += embedded[token]
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    folder.mkdir()
    seal(folder, str(checkpoint), convert.convert(checkpoint, folder, None, silent), silent)
    return open_folder(folder, str(folder))


def _config(tokenizer: PreTrainedTokenizerFast) -> object:
    return AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(_SPECIAL)})
    pieces = [piece for answer in _ANSWERS for piece in answer if piece not in _SPECIAL]
    tokenizer.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in pieces])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
