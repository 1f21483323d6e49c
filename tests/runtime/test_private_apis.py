"""What the program uses of other libraries' private APIs does what it is used for."""

import hashlib
import os
import sys
import threading
from concurrent import futures
from pathlib import Path
from typing import Any

import gradio
import grpc
import pytest
import torch
from huggingface_hub import snapshot_download
from transformers import BertTokenizer, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from splitlearn.runtime import private_apis
from tests.support import ROOT
from tests.support.children import output_of
from tests.support.fake_hub import hub_here


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
    )


def test_a_new_model_has_the_class_the_attention_and_the_dtype_that_were_asked_for() -> None:
    model = private_apis.new_causal_model(LlamaForCausalLM, _config(), "eager", torch.bfloat16)
    assert isinstance(model, LlamaForCausalLM)
    assert private_apis.attention_of(model.config) == "eager"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_attention_that_was_set_is_the_one_that_is_called() -> None:
    model = private_apis.new_causal_model(LlamaForCausalLM, _config(), "eager", torch.float32)
    private_apis.set_attention(model.config, "no_such_attention")
    with pytest.raises(Exception, match="no_such_attention"):
        model(torch.zeros(1, 1, dtype=torch.long))
    assert private_apis.takes_any_attention(LlamaForCausalLM)


def test_kernels_that_a_configuration_names_are_forgotten() -> None:
    config = _config()
    private_apis.set_attention(config, "somebody/kernel")
    private_apis.forget_kernels(config)
    assert private_apis.attention_of(config) is None


def test_tensors_of_a_checkpoint_are_called_and_converted_as_transformers_does_it() -> None:
    config = MixtralConfig(
        vocab_size=16, hidden_size=8, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = private_apis.new_causal_model(MixtralForCausalLM, config, "eager", torch.float32)
    expert, merged = "layers.0.block_sparse_moe.experts", "model.layers.0.mlp.experts"
    names = private_apis.checkpoint_names(model, [f"{expert}.1.w3.weight", "norm.weight", "model.layers.7.odd"])
    assert list(names.values()) == [f"{merged}.gate_up_proj", "model.norm.weight", "model.layers.7.odd"]
    may_be_there = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert private_apis.unplaced(model, [*names.values(), may_be_there]) == {"model.layers.7.odd"}

    down = {f"{expert}.{each}.w2.weight": torch.full((8, 4), float(each)) for each in range(2)}
    others, failed = private_apis.load_tensors(model, {**down, "norm.weight": torch.ones(5)}, torch.float32)
    assert [(name, list(has)) for name, has, _ in others] == [("model.norm.weight", [5])] and not failed
    state = model.state_dict()
    assert torch.equal(state[f"{merged}.down_proj"], torch.stack(list(down.values())))
    assert state[f"{merged}.gate_up_proj"].is_meta


def test_the_hashes_that_the_hub_listed_are_known(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "some.safetensors").write_bytes(b"weights")
    with hub_here("owner/model", tmp_path / "served", tmp_path / "hub"):
        snapshot = Path(snapshot_download("owner/model", allow_patterns=[]))
    known = private_apis.hub_sha256(tmp_path / "hub" / "models--owner--model", snapshot.name)
    assert known == {"some.safetensors": hashlib.sha256(b"weights").hexdigest()}
    assert private_apis.hub_sha256(tmp_path, snapshot.name) == {}


def test_the_python_class_of_a_rust_tokenizer_is_found_where_there_is_one() -> None:
    words = {word: number for number, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"))}
    python = private_apis.python_tokenizer_class(BertTokenizer(vocab=words))
    assert python is not None and python.__name__ == "BertTokenizerLegacy"
    assert private_apis.python_tokenizer_class(object()) is None


def test_the_packed_product_is_that_of_a_linear_layer() -> None:
    weight, bias, x = torch.randn(6, 4), torch.randn(6), torch.randn(3, 4)
    packed = private_apis.mkldnn_packed(weight)
    out = private_apis.mkldnn_linear()(x, packed, bias, "none", [], "")
    torch.testing.assert_close(out, torch.nn.functional.linear(x, weight, bias))
    assert torch.equal(packed.to_dense(), weight)
    assert private_apis.mkldnn_supports("float32") and private_apis.mkldnn_supports("bfloat16") in (True, False)


def test_compiling_takes_time_that_is_counted_and_variants_are_only_ever_raised() -> None:
    before = private_apis.compile_seconds()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    assert private_apis.compile_seconds() > before
    limit = torch._dynamo.config.recompile_limit
    private_apis.allow_variants(limit + 1)
    private_apis.allow_variants(1)
    assert torch._dynamo.config.recompile_limit == limit + 1
    torch._dynamo.config.recompile_limit = limit


def test_a_call_is_ended_from_another_thread_with_a_status_and_a_reason() -> None:
    contexts: list[grpc.ServicerContext] = []
    entered, over = threading.Event(), threading.Event()

    def handler(_: bytes, context: grpc.ServicerContext) -> bytes:
        contexts.append(context)
        entered.set()
        over.wait(60)
        return b""

    server = grpc.server(futures.ThreadPoolExecutor(1))
    methods: dict[str, Any] = {"Wait": grpc.unary_unary_rpc_method_handler(handler)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        method: Any = channel.unary_unary("/test.Test/Wait")
        call = method.future(b"")
        assert entered.wait(60)
        private_apis.end_call(contexts[0], grpc.StatusCode.DEADLINE_EXCEEDED, "too long")
        error = call.exception(60)
    over.set()
    server.stop(None)
    assert isinstance(error, grpc.RpcError)
    assert (error.code(), error.details()) == (grpc.StatusCode.DEADLINE_EXCEEDED, "too long")


def test_the_queue_of_a_page_says_what_waits_to_be_read() -> None:
    with gradio.Blocks() as blocks:
        gradio.Markdown("x")
    queue = private_apis.page_queue(blocks.queue())
    assert queue.pending_messages_per_session is not None and queue.pending_event_ids_session is not None


def test_a_module_with_other_children_shares_all_else() -> None:
    own = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    changed = private_apis.with_children(
        own, lambda child: torch.nn.Identity() if len(list(child.parameters())) else child
    )
    x = torch.tensor([[-1.0, 2.0]])
    assert torch.equal(changed(x), x.relu())
    assert torch.equal(own(x), own[0](x).relu())
    assert changed[1] is own[1]


def test_a_component_defined_without_stub_files_works_and_has_none(tmp_path: Path) -> None:
    source = "from gradio.components import Textbox\nclass Field(Textbox):\n    EVENTS = ['change']\n"
    (tmp_path / "with_stub.py").write_text(source, encoding="utf-8")
    (tmp_path / "without_stub.py").write_text(source, encoding="utf-8")
    code = (
        "from splitlearn.runtime.private_apis import without_stub_files\n"
        "with without_stub_files():\n    import gradio, without_stub\n"
        "import with_stub\n"
        "assert without_stub.Field(label='x').change and gradio.Textbox(label='y').change\n"
    )
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    output_of([sys.executable, "-c", code], environment={**os.environ, "PYTHONPATH": path})
    assert [stub.name for stub in tmp_path.glob("*.pyi")] == ["with_stub.pyi"]


def test_models_are_imported_without_scipy_where_it_is_said_to_be_missing() -> None:
    code = """
import sys
from splitlearn.runtime import private_apis
private_apis.without_scipy()
from transformers import LlamaForCausalLM
print("scipy" in sys.modules)
"""
    assert output_of([sys.executable, "-c", code]) == "False\n"


def test_the_shipped_response_templates_read_a_call_and_an_unreadable_one_loses_nothing() -> None:
    first, *others = private_apis.shipped_response_templates()
    assert others and "tool_calls" in first["fields"]
    parser = private_apis.response_parser(
        {**first, "fields": {**first["fields"], "never": {"open": "?", "optional": False}}}, "", []
    )
    events = parser.feed('A<tool_call>{</tool_call>B<tool_call>{"name": "look"}</tool_call>')
    closed = [(each["field"], each["value"]) for each in events if each["type"] == "region_close"]
    call = {"type": "function", "function": {"name": "look"}}
    assert closed == [("content", "A"), ("tool_calls", None), ("content", "B"), ("tool_calls", call)]
    assert parser.finalize()[1] == []
