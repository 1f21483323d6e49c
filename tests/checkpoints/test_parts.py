"""A part of a sharded model comes from the hub alone: its files, its tensors, and the digest of the whole."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import _http
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import splitlearn
from splitlearn import config
from splitlearn.checkpoints import catalogue, convert, download, shards
from splitlearn.checkpoints.download import PartOf
from splitlearn.checkpoints.folder import ModelFiles, fingerprint, open_folder, seal, sha256
from splitlearn.checkpoints.hub import HubSource
from splitlearn.checkpoints.inspection import INDEX
from splitlearn.checkpoints.pack import pack
from splitlearn.cli.main import main as command
from splitlearn.config import ModelConfig
from splitlearn.errors import InputError, ModelError, ModelUnavailable
from splitlearn.events import GenerationRequest, TokenEvent
from splitlearn.models.part import Part
from splitlearn.models.plan import SplitPlan
from splitlearn.runtime.progress import Step, silent
from tests.support.fake_hub import COMMIT, HubHere, hub_here
from tests.support.opened import opened_in
from tests.support.tiny import make_checkpoint, make_tokenizer
from tests.support.trunk import PLAN, run_here

REPO = "owner/model"
TRUNK, CLIENT = Part.of_trunk(PLAN), Part.of_client(PLAN)
OWN_FILES = ("model.safetensors", "manifest.json")
SHARD_BYTES = "100KB"
"""About a layer of the tiny models."""


def make_sharded(folder: Path, family: str = "llama", dtype: str = "float32") -> Path:
    """A tiny checkpoint with an index and some files of weights."""
    checkpoint = make_checkpoint(folder, family, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size=SHARD_BYTES)
    return checkpoint


def make_with_images(folder: Path) -> Path:
    """As `make_sharded`, of a model with a part for images: its tensors have other names than the language model's."""
    tokenizer = make_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
    linear = {f"linear_{each}": 2 for each in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")}
    images = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 48}
    text = {**sizes, **heads, **linear, "dtype": "bfloat16"}
    config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=images, dtype="bfloat16")
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder, max_shard_size=SHARD_BYTES)
    tokenizer.save_pretrained(folder)
    return folder


def weight_map(checkpoint: Path) -> dict[str, str]:
    """The index."""
    found: dict[str, str] = json.loads((checkpoint / INDEX).read_text())["weight_map"]
    return found


def files_with(checkpoint: Path, *words: str) -> list[str]:
    """The files of weights with a tensor that has one of `words` in its name."""
    return sorted({file for name, file in weight_map(checkpoint).items() if any(word in name for word in words)})


TRUNK_WORDS = (".layers.2.", ".layers.3.")
CLIENT_WORDS = ("embed_tokens", ".layers.0.", ".layers.1.", ".layers.4.", ".layers.5.", "model.norm")


def of(part: Part) -> PartOf:
    """The part, whatever the number of layers."""
    return lambda n_layers: part


@dataclass
class Machine:
    """A machine with an empty cache that fetches from the hub. `steps`: what it said meanwhile."""

    hub: HubHere
    blobs: Path
    steps: list[Step] = field(default_factory=list)

    def prepare(self, part: Part | None = None) -> ModelFiles:
        """The model, or a part of it."""
        model = ModelConfig(name=REPO)
        return catalogue.prepare(model, self.steps.append, part=None if part is None else of(part))

    def weights_sent(self) -> list[str]:
        """The files of weights that the hub has sent since this was asked last."""
        sent = [name for name in self.hub.behaviour.sent if name.partition(" ")[0].endswith(".safetensors")]
        self.hub.behaviour.sent.clear()
        return sorted(sent)


@pytest.fixture
def machine(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setattr(convert, "convert_in_subprocess", convert.convert)
    with hub_here(REPO, make_sharded(tmp_path / "served"), tmp_path / "hub") as hub:
        yield Machine(hub, tmp_path / "hub" / "models--owner--model" / "blobs")


def ids_of(stages: splitlearn.Stages, request: GenerationRequest) -> list[int]:
    """The tokens of the answer."""
    return [each for event in stages.events(request) if isinstance(event, TokenEvent) for each in event.token_ids]


def downloaded(steps: list[Step]) -> float:
    """The bytes that the bar of the weights ends at; of the two bars, one is for the small files."""
    return max(step.total or 0 for step in steps if step.label.startswith("Downloading"))


def test_a_trunk_and_a_client_fetch_their_own_files_and_give_the_tokens_of_the_whole_model(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = machine.hub.served
    own = {"model": {"name": REPO, "device": "cpu"}, "split": {"start": 2, "end": 4}, "server": {"port": 0}}
    flags = {"flags": "trunk:none", "runs": {"threads": 1}}
    request = GenerationRequest("The sky is blue because", 12)
    with run_here(config.parse({**own, **flags}), machine.steps.append) as trunk:
        assert machine.weights_sent() == (of_trunk := files_with(served, *TRUNK_WORDS))
        assert downloaded(machine.steps) == sum((served / name).stat().st_size for name in of_trunk)
        assert trunk.runtime.files.part == TRUNK

        monkeypatch.setenv("SPLITLEARN_CACHE", str(tmp_path / "client"))  # another machine
        with hub_here(REPO, served, tmp_path / "client-hub") as hub:
            client = Machine(hub, tmp_path)
            with splitlearn.load_split(REPO, 2, 4, trunk=trunk.address, flags="use_cache", threads=1) as split:
                assert client.weights_sent() == (of_client := files_with(served, *CLIENT_WORDS))
                tokens = ids_of(split, request)
            full = splitlearn.load_full(REPO, flags="use_cache", threads=1)
            assert client.weights_sent() == sorted(set(weight_map(served).values()) - set(of_client))  # the rest of it
    assert tokens == ids_of(full, request)
    assert 0 < len(of_trunk) < len(of_client) < len(set(weight_map(served).values()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "opt", "images"])
def test_a_part_has_the_tensors_and_the_digest_of_the_whole(tmp_path: Path, family: str) -> None:
    folder = tmp_path / "checkpoint"
    checkpoint = make_with_images(folder) if family == "images" else make_sharded(folder, family, dtype="bfloat16")
    known = fingerprint(sha256(checkpoint / name) for name in set(weight_map(checkpoint).values()))

    def converted(name: str, part: Part | None) -> tuple[ModelFiles, dict[str, torch.Tensor]]:
        (target := tmp_path / name).mkdir()
        facts = convert.convert(checkpoint, target, None, silent, part)
        seal(target, "any", facts, silent, weights_sha256=known)
        files = open_folder(target, "any")
        return files, load_file(files.weights)

    whole, every = converted("whole", None)
    parts: dict[str, torch.Tensor] = {}
    for name, part in (("trunk", TRUNK), ("client", CLIENT)):
        files, tensors = converted(name, part)
        assert files.digest == whole.digest
        same = {path.name: path.read_bytes() for path in whole.folder.iterdir() if path.name not in OWN_FILES}
        assert same == {path.name: path.read_bytes() for path in files.folder.iterdir() if path.name not in OWN_FILES}
        assert parts.keys().isdisjoint(tensors)
        parts |= tensors
    assert parts.keys() == every.keys()
    assert all(tensor.dtype == torch.bfloat16 and torch.equal(tensor, every[name]) for name, tensor in parts.items())


def test_of_a_whole_snapshot_a_part_opens_its_own_files_alone(machine: Machine) -> None:
    download.fetch(HubSource(REPO), machine.blobs, silent)
    snapshot = machine.blobs.parent / "snapshots" / COMMIT
    blob_of = {name: (snapshot / name).resolve().name for name in set(weight_map(machine.hub.served).values())}
    machine.weights_sent()
    with opened_in(machine.blobs) as opened:
        files = machine.prepare(TRUNK)
    own = {blob_of[name] for name in files_with(machine.hub.served, *TRUNK_WORDS)}
    assert opened & set(blob_of.values()) == own
    assert machine.weights_sent() == []
    assert load_file(files.weights).keys() == {
        name for name in weight_map(machine.hub.served) if any(word in name for word in TRUNK_WORDS)
    }


def test_a_part_that_is_here_serves_what_is_in_it_without_the_hub(machine: Machine) -> None:
    first = machine.prepare(TRUNK)
    machine.hub.refuse(503)
    assert machine.prepare(TRUNK) == first
    within = machine.prepare(Part(((3, 4),)))
    assert (within.folder, within.part, within.digest) == (first.folder, Part(((3, 4),)), first.digest)
    for part in (Part(((1, 4),)), None):
        with pytest.raises(ModelUnavailable, match=r"HTTP status 503.* lacks model-0"):
            machine.prepare(part)
    machine.hub.refusals.clear()
    machine.weights_sent()
    whole = machine.prepare()
    assert (whole.part, whole.digest) == (None, first.digest)
    assert not {*machine.weights_sent()} & {*files_with(machine.hub.served, *TRUNK_WORDS)}
    assert machine.prepare(TRUNK).folder == whole.folder
    listed = {status.name for status in catalogue.catalogue_status(ModelConfig())}
    assert {"owner--model", "owner--model@2-4"} <= listed


def test_a_local_folder_gives_parts_with_the_digest_that_the_hub_gives_and_is_hashed_once(machine: Machine) -> None:
    local = ModelConfig(name=str(machine.hub.served))
    trunk, client = (catalogue.prepare(local, machine.steps.append, part=of(part)) for part in (TRUNK, CLIENT))
    assert trunk.digest == client.digest == machine.prepare(TRUNK).digest == catalogue.prepare(local, silent).digest
    assert (trunk.part, client.part) == (TRUNK, CLIENT)
    hashings = [step for step in machine.steps if step.label == "Hashing the files of weights"]
    assert len(hashings) == 1


def test_a_slice_is_packed_from_its_own_files(machine: Machine, tmp_path: Path) -> None:
    assert command(["models", "pack", REPO, "--layers", "2:4", str(tmp_path / "out")]) == 0
    assert machine.weights_sent() == files_with(machine.hub.served, *TRUNK_WORDS)
    packed = open_folder(tmp_path / "out", "any")
    assert (packed.part, packed.digest, packed.name) == (TRUNK, machine.prepare(TRUNK).digest, REPO)
    with pytest.raises(ModelError, match=r"has the layers \[2, 4\) of .* alone, and the layers \[1, 4\) are asked for"):
        pack(packed, Part(((1, 4),)), tmp_path / "more", silent)


@pytest.mark.parametrize("part", [TRUNK, None])
def test_a_file_that_is_not_the_listed_one_is_refused_by_name_and_fetched_anew(
    machine: Machine, part: Part | None
) -> None:
    spoilt = files_with(machine.hub.served, ".layers.2.")[-1]
    machine.hub.behaviour.wrong = {spoilt}
    with pytest.raises(ModelUnavailable, match=rf"^{spoilt} of {REPO} is not the file that the model hub lists"):
        machine.prepare(part)
    machine.hub.behaviour.wrong = set()
    machine.weights_sent()
    machine.prepare(part)
    assert machine.weights_sent() == [spoilt]


def test_a_hub_that_lists_a_file_of_this_machine_does_not_have_it_removed(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "own.safetensors").write_text("not what the hub lists")
    machine.hub.behaviour.listed = [f"{'../' * 4}own.safetensors", str(tmp_path / "own.safetensors")]
    assert (machine.blobs.parent / "snapshots" / COMMIT / machine.hub.behaviour.listed[0]).resolve() == (
        tmp_path / "own.safetensors"
    )
    machine.prepare(TRUNK)
    machine.prepare()
    assert (tmp_path / "own.safetensors").exists()


def test_a_connection_that_ends_in_a_file_goes_on_there(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 10)
    first, *others = files_with(machine.hub.served, *TRUNK_WORDS)
    machine.hub.behaviour.cuts = {first: 10 << 10}
    machine.prepare(TRUNK)
    assert machine.weights_sent() == sorted([first, f"{first} bytes=10240-", *others])


def test_a_hub_that_dies_between_files_is_one_line_and_the_rest_comes_later(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))  # between five tries
    *others, last = files_with(machine.hub.served, *TRUNK_WORDS)
    machine.hub.refuse(503, machine.hub.file(last))
    with pytest.raises(ModelUnavailable, match=rf"^The model hub did not give {REPO}.* lacks .*{last}") as caught:
        machine.prepare(TRUNK)
    assert "\n" not in str(caught.value)
    machine.hub.refusals.clear()
    had = {name for name in machine.weights_sent() if (machine.blobs.parent / "snapshots" / COMMIT / name).exists()}
    machine.prepare(TRUNK)
    assert machine.weights_sent() == sorted({*others, last} - had)


def test_a_split_that_the_model_does_not_have_is_refused_before_weights_are_fetched(machine: Machine) -> None:
    with pytest.raises(InputError, match=r"split\.end: 9"):
        catalogue.prepare(ModelConfig(name=REPO), silent, part=lambda n: Part.of_trunk(SplitPlan.of(2, 9, n)))
    assert machine.weights_sent() == []


def _quantized(machine: Machine) -> None:
    path = machine.hub.served / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "fp8"}}))


def _adapted(machine: Machine) -> None:
    (machine.hub.served / "adapter_config.json").write_text("{}")


def _tied_and_apart(machine: Machine) -> None:
    index = json.loads((machine.hub.served / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    (machine.hub.served / INDEX).write_text(json.dumps(index))


def _one_file(machine: Machine) -> None:
    make_checkpoint(machine.hub.served)
    (machine.hub.served / INDEX).unlink()


def _no_model(machine: Machine) -> None:
    path = machine.hub.served / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": "wide"}))


def _unhashed(machine: Machine) -> None:
    machine.hub.behaviour.unhashed = True


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_quantized, "its weights are quantized"),
        (_adapted, "an adapter changes its weights"),
        (_tied_and_apart, "lm_head.weight is in its weights, and tied by its config.json"),
        (_one_file, "its weights are one file"),
        (_no_model, ""),
        (_unhashed, "the hub gives no SHA-256 of model-00001"),
    ],
)
def test_a_model_of_which_no_part_can_be_known_alone_is_fetched_whole_and_a_line_says_why(
    machine: Machine, change: Callable[[Machine], None], why: str
) -> None:
    change(machine)
    assert download.fetch_part(HubSource(REPO), of(TRUNK), machine.steps.append) is None
    assert machine.steps[-1].label.startswith(f"All of hub {REPO} is needed, not some layers alone: {why}")
    assert machine.weights_sent() == []


def test_a_tensor_that_is_missing_or_has_another_shape_is_named(tmp_path: Path) -> None:
    checkpoint = make_sharded(tmp_path / "checkpoint")
    name = "model.layers.3.mlp.up_proj.weight"
    path = checkpoint / weight_map(checkpoint)[name]
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name][:7].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name} \[7, 48\] in the place of \[96, 48\]"):
        shards.load(checkpoint, TRUNK)
    index = json.loads((checkpoint / INDEX).read_text())
    del index["weight_map"][name]
    (checkpoint / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=rf"lacks 1 of its model's tensors, among them {name}\."):
        shards.load(checkpoint, TRUNK)
    shards.load(checkpoint, CLIENT)
