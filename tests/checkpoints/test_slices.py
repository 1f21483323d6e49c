"""A slice of a model: what is in it, who can use it, and that it is the same model."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from server.__main__ import main as serve_command
from splitlearn.checkpoints import catalogue
from splitlearn.checkpoints.folder import MANIFEST, ModelFiles, open_folder
from splitlearn.checkpoints.pack import pack
from splitlearn.cli.main import main as command
from splitlearn.config import ModelConfig
from splitlearn.errors import ModelError, WeightsDamaged
from splitlearn.events import GenerationRequest
from splitlearn.models.part import Part
from splitlearn.runtime.progress import silent
from splitlearn.stages import loading
from tests.conftest import TinyFactory
from tests.support import ROOT
from tests.support.client import CACHED, client
from tests.support.forks import Fork
from tests.support.trunk import PLAN, TrunkHere, serve, settings
from tests.support.words import load_of

CPU = loading.Placement(torch.device("cpu"), torch.float32)
TRUNK, CLIENT = Part(((PLAN.start, PLAN.end),)), Part(((0, PLAN.start), (PLAN.end, PLAN.n_layers)), ends=True)


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory, files: ModelFiles) -> ModelFiles:
    """The trunk's layers of `files`, packed by the command."""
    out = tmp_path_factory.mktemp("slices") / "trunk"
    assert command(["models", "pack", str(files.folder), "--layers", f"{PLAN.start}:{PLAN.end}", str(out)]) == 0
    return open_folder(out, "another name")


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt"])
def test_slices_have_the_tensors_of_their_parts_and_the_digest_of_the_whole(
    tmp_path: Path, tiny_model: TinyFactory, family: str
) -> None:
    whole = tiny_model(family)
    every = load_file(whole.weights)
    sliced: dict[str, torch.Tensor] = {}
    for part, specs in ((TRUNK, loading.trunk_specs(PLAN)), (CLIENT, loading.client_specs(PLAN))):
        folder = tmp_path / str(part.ends)
        pack(whole, part, folder, silent)
        found = open_folder(folder, "any")
        assert (found.name, found.digest, found.facts, found.part) == (whole.name, whole.digest, whole.facts, part)
        assert loading.load(found, specs, load_of(CACHED), CPU).chain
        assert sliced.keys().isdisjoint(tensors := load_file(found.weights))
        sliced |= tensors
    assert sliced.keys() == every.keys()
    assert all(torch.equal(tensor, every[name]) for name, tensor in sliced.items())


def test_a_server_on_a_slice_needs_nothing_else(
    trunk: ModelFiles, files: ModelFiles, here: TrunkHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPLITLEARN_CACHE", str(tmp_path / "empty"))
    request = GenerationRequest("The sky is blue because", 12)
    with client(files, here.address) as split:
        expected = split.ask(request).token_ids
    with ExitStack() as away:
        files.folder.rename(tmp_path / "whole")
        away.callback((tmp_path / "whole").rename, files.folder)
        with serve(settings(trunk), tmp_path) as running:
            away.close()
            with client(files, running.address) as split:
                assert split.ask(request).token_ids == expected
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize("split", [(0, 3), (2, 5), (4, 6)])
def test_a_server_that_is_to_serve_other_layers_than_its_slice_has_says_so_in_one_line(
    trunk: ModelFiles, files: ModelFiles, tmp_path: Path, split: tuple[int, int]
) -> None:
    own = settings(trunk, split=dict(zip(("start", "end"), split, strict=True)))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(own))
    server = Fork(serve_command, ["--config", str(tmp_path / "config.yaml")], ROOT, tmp_path / "errors")
    assert (server.stdout.read(), server.wait(60)) == ("", 2)
    has = f"has the layers [2, 4) of {files.name} alone, and the layers [{split[0]}, {split[1]}) are asked for."
    assert (tmp_path / "errors").read_text().splitlines()[-1] == f"error: {trunk.folder} {has}"
    server.close()


def test_a_slice_is_no_model_for_what_needs_the_whole(trunk: ModelFiles) -> None:
    with pytest.raises(ModelError, match=r"has the layers \[2, 4\) of .* alone, and the whole model is needed"):
        catalogue.prepare(ModelConfig(name=str(trunk.folder)), silent)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--layers", "2-4", "new"], "layers: '2-4' cannot be used; expected START:END"),
        (["--layers", "4:4", "new"], "layers: '4:4' cannot be used; expected layers within 0:6"),
        (["--layers", "4:7", "new"], "layers: '4:7' cannot be used; expected layers within 0:6"),
        (["--layers", "2:4", "."], "OUT: '.' cannot be used; expected a folder that is not there yet"),
    ],
)
def test_what_cannot_be_packed_is_refused(
    files: ModelFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(["models", "pack", str(files.folder), *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("part", [{}, {"layers": [[3, 2]], "ends": False}, {"layers": [["a", 2]], "ends": False}, 7])
def test_a_damaged_part_is_named(trunk: ModelFiles, tmp_path: Path, part: object) -> None:
    shutil.copytree(trunk.folder, tmp_path / "copy")
    manifest = json.loads((tmp_path / "copy" / MANIFEST).read_text())
    (tmp_path / "copy" / MANIFEST).write_text(json.dumps(manifest | {"part": part}))
    with pytest.raises(WeightsDamaged, match=r"manifest\.json cannot be read"):
        open_folder(tmp_path / "copy", "copy")
