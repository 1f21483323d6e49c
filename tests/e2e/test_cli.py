"""`python -m splitlearn`: what it prints, and the one line that it says for what cannot be done."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from splitlearn.checkpoints.catalogue import CATALOGUE
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.cli import main as command_line
from splitlearn.flags.registry import FLAGS
from tests.client.test_remote import free_port
from tests.conftest import TinyFactory
from tests.support import ROOT
from tests.support.forks import printed
from tests.support.trunk import Trunk, environment, serve, settings

ARM = {
    "token_ids": list, "text": str, "finish_reason": str, "n_tokens": int, "ttft_s": float, "tpot_s": float,
    "tps": float, "decode_tps": float, "e2el_s": float, "itl_p50_s": float, "peak_rss_bytes": int,
    "import_rss_bytes": int, "load_s": float, "compile_s": (int, float), "dtype": str, "threads": int, "ledger": dict,
}  # fmt: skip
SPLIT_ARM = {**ARM, "bytes_up": int, "bytes_down": int, "trunk_address": str, "trunk_peak_rss_bytes": int}
SPLIT_ARM |= {"recoveries": list}
COMPARISON = {
    "model": str, "split": dict, "flags": list, "full": dict, "split_run": dict, "identical_tokens": bool,
    "prompt": dict, "divergence": (dict, type(None)), "environment": dict,
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def trunk(files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trunk]:
    with serve(settings(files), tmp_path_factory.mktemp("trunk")) as running:
        yield running


@pytest.fixture
def folder(files: ModelFiles, trunk: Trunk, tmp_path: Path) -> Path:
    """A folder with a config.yaml for the tiny model and a trunk that runs."""
    return configured(tmp_path, settings(files, trunk={"address": trunk.address}))


def configured(folder: Path, config: Mapping[str, Any]) -> Path:
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config)))
    return folder


def with_config(folder: Path, arguments: Sequence[str]) -> list[str]:
    """`arguments` with the config.yaml of `folder`, where there is one and the command takes one."""
    given = "--config" in arguments or not (folder / "config.yaml").exists() or arguments[:1] in ([], ["report"])
    return [*arguments] if given else [*arguments, "--config", str(folder / "config.yaml")]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, as a person runs it in `folder` with the config.yaml there."""
    command = [sys.executable, "-m", "splitlearn", *with_config(folder, list(arguments))]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)


class Refusal:
    """Runs the command line in this process and gives the one line that it must end with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def of(self, folder: Path, *arguments: str) -> str:
        """The error line; stdout must be empty and the status 2."""
        self._monkeypatch.chdir(folder)
        self._capsys.readouterr()
        assert command_line.main(with_config(folder, list(arguments))) == 2
        printed = self._capsys.readouterr()
        assert printed.out == ""
        *before, last = printed.err.splitlines()
        assert not [line for line in before if "rror" in line or "Traceback" in line]
        assert last.startswith("error: ")
        return last


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refusal:
    return Refusal(monkeypatch, capsys)


def check_types(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """`found` has every key of `expected`, with a value of its type."""
    wrong = {name: found.get(name, "missing") for name, kind in expected.items()
             if name not in found or not isinstance(found[name], kind)}  # fmt: skip
    assert not wrong


def check_arm(arm: Mapping[str, Any], tokens: int) -> None:
    """The figures of one arm agree with each other."""
    assert arm["n_tokens"] == len(arm["token_ids"]) == tokens
    assert arm["e2el_s"] == pytest.approx(arm["ttft_s"] + (tokens - 1) * arm["tpot_s"])
    assert arm["tps"] == pytest.approx(tokens / arm["e2el_s"])
    assert arm["decode_tps"] == pytest.approx(1 / arm["tpot_s"])
    assert sum(arm["ledger"].values()) == pytest.approx(arm["e2el_s"])
    assert all(name.endswith("_s") for name in arm["ledger"])
    assert list(arm["ledger"])[-1] == "unattributed_s"
    assert arm["peak_rss_bytes"] > arm["import_rss_bytes"] > 0
    assert (arm["finish_reason"], arm["dtype"], arm["threads"]) == ("length", "float32", 1)


def test_compare_prints_one_object_with_both_arms_and_nothing_else(files: ModelFiles, tmp_path: Path) -> None:
    configured(tmp_path, settings(files))  # with an embedded trunk
    sampling = ("--seed", "7", "--temperature", "0.8", "--top-k", "50", "--top-p", "0.9", "--repetition-penalty", "1.1")
    asked = ("compare", "--prompt", "Why is the sky blue?", "--max-new-tokens", "16", "--ignore-eos", "--json")
    command = with_config(tmp_path, [*asked, *sampling])
    found = json.loads(printed(command_line.main, command, tmp_path, tmp_path / "errors"))
    check_types(found, COMPARISON)
    check_types(found["full"], ARM)
    check_types(found["split_run"], SPLIT_ARM)
    assert not set(SPLIT_ARM) - set(ARM) & set(found["full"])
    for arm in ("full", "split_run"):
        check_arm(found[arm], 16)
    assert found["model"] == files.name
    assert found["split"] == {"start": 2, "end": 4, "n_layers": 6}
    assert (found["identical_tokens"], found["divergence"], found["link"]) == (True, None, None)
    assert found["full"]["token_ids"] == found["split_run"]["token_ids"]
    assert "use_cache" in found["flags"]
    assert "torch_compile" not in found["flags"]
    assert found["split_run"]["bytes_up"] > 16 * files.facts.hidden_size * 4
    assert found["split_run"]["trunk_address"].startswith("127.0.0.1:")
    assert not set(found["full"]["ledger"]) & {"wire_s", "trunk_s"}
    assert found["prompt"]["text"] == "<|user|>Why is the sky blue?<|end|><|assistant|>"
    assert found["prompt"]["control_tokens"] == ["<|user|>", "<|end|>", "<|assistant|>"]
    assert len(found["prompt"]["token_ids"]) == found["full"]["prompt_tokens"]


def test_compare_over_a_link_has_what_was_predicted_and_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    asked = ["compare", "--max-new-tokens", "4", "--ignore-eos", "--link", "lan,rtt=40ms", "--config", "config.yaml"]
    assert command_line.main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    link = found["link"]
    assert found["identical_tokens"]
    assert link["emulated"]["words"] == "rtt=40ms,up=1000mbit,down=1000mbit"
    assert link["predicted"]["tpot_s"] > link["without"]["tpot_s"] + 0.04
    assert link["measured"]["tpot_s"] == found["split_run"]["tpot_s"] > 0.039
    assert all(value > 0 for value in link["real"].values())
    assert command_line.main(asked) == 0
    said = capsys.readouterr().out
    for word in (
        "Link: measured ",
        "; emulated 40 ms, 1000 Mbit/s up, 1000 Mbit/s down.",
        "predicted",
        "measured / predicted",
    ):
        assert word in said


def test_compare_gives_every_sample_and_the_tokens_per_second_of_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    asked = ("compare", "--max-new-tokens", "8", "--ignore-eos", "--samples", "3", "--temperature", "0.8", "--json")
    assert command_line.main(with_config(folder, asked)) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["identical_tokens"], found["divergence"]) == (True, None)
    for arm in (found["full"], found["split_run"]):
        ids = [arm["token_ids"], *(sample["token_ids"] for sample in arm["other_samples"])]
        assert len({tuple(each) for each in ids}) == 3
        assert arm["tps_all_samples"] == pytest.approx(24 / arm["e2el_s"])


def test_compare_prints_a_table_for_people(
    folder: Path, trunk: Trunk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    groups = ("--flags", "full:none", "client:use_cache", "trunk:none")
    assert (
        command_line.main(
            ["compare", "--prompt", "Why?", "--max-new-tokens", "4", "--ignore-eos", *groups, "--config", "config.yaml"]
        )
        == 0
    )
    said = capsys.readouterr().out
    for word in ("full", "split", "TTFT", "TPOT", "TPS (request)", "wire", "Tokens of full and split: identical"):
        assert word in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", ""], ["prompt: ''", "some text"]),
        (["--prompt", " \n\t"], ["prompt: ' \\n\\t'", "some text"]),
        (["--max-new-tokens", "0"], ["max_new_tokens: 0", "from 1 to"]),
        (["--max-new-tokens", "-1"], ["max_new_tokens: -1", "from 1 to"]),
        (["--max-new-tokens", "1000000000"], ["max_new_tokens: 1000000000", "from 1 to"]),
        (["--max-new-tokens", "x"], ["max_new_tokens: 'x'", "a whole number"]),
        (["--max-new-tokens", "1.5"], ["max_new_tokens: '1.5'", "a whole number"]),
        (["--temperature", "-1"], ["temperature: -1.0", "0 (greedy) or a number from 0.001"]),
        (["--temperature", "nan"], ["temperature: nan", "0 (greedy)"]),
        (["--temperature", "inf"], ["temperature: inf", "0 (greedy)"]),
        (["--temperature", "hot"], ["temperature: 'hot'", "a number"]),
        (["--top-p", "0"], ["top_p: 0.0", "above 0, up to 1"]),
        (["--top-p", "1.1"], ["top_p: 1.1", "above 0, up to 1"]),
        (["--top-k", "-1"], ["top_k: -1", "0 or more"]),
        (["--repetition-penalty", "0"], ["repetition_penalty: 0.0", "0.01 to 100"]),
        (["--seed", "-1"], ["seed: -1", "from 0"]),
        (["--seed", str(2**64)], [f"seed: {2**64}", "2**63 - 1"]),
        (["--samples", "0"], ["samples: 0", "from 1 to 16"]),
        (["--samples", "2"], ["samples: 2", "a temperature above 0"]),
        (["--samples", "many"], ["samples: 'many'", "a whole number"]),
        (["--stop", ""], ["stop", "none of them empty"]),
        (["--trunk", "nowhere"], ["trunk.address: 'nowhere'", "host:port"]),
        (["--trunk", "host:99999"], ["trunk.address: 'host:99999'", "1 to 65535"]),
        (["--no-such-option"], ["--no-such-option", "--help"]),
        (["--flags", "no_such"], ["flags: 'no_such'", "use_cache"]),
        (["--flags", "use_cache,use_cache=off"], ["flags: 'use_cache,use_cache=off'", "exclude each other"]),
        (["--flags", "float32_matmul_precision=high,float32_matmul_precision=medium"], ["exclude each other"]),
        (["--flags", "float32_matmul_precision=low"], ["float32_matmul_precision: 'low'", "highest, high, medium"]),
        (["--flags", "default,use_cache"], ["'default' to stand alone"]),
        (["--flags", "full:all", "full:none"], ["one group for each side; full has two"]),
        (["--flags", "side:all"], ["full:, client:, trunk:"]),
        (["--flags", "trunk:use_fast"], ["flags: 'use_fast'", "does not act on this side"]),
        (["--prompt", "word " * 2000], ["prompt: ", "tokens", "at most 511 tokens: the context holds 512"]),
        (["--link", "wify"], ["link: 'wify'", "wifi, 4g"]),
        (["--link", "rtt=5"], ["link: 'rtt=5'", "rtt=5ms"]),
        (["--max-new-tokens", "511"], ["max_new_tokens: 511", "of the context's 512 tokens"]),
    ],
    ids=lambda value: " ".join(value)[:40] if value and value[0].startswith("--") else "",
)
def test_what_cannot_be_asked_is_one_line_with_what_would_be_right(
    arguments: list[str], words: list[str], folder: Path, refusal: Refusal
) -> None:
    said = refusal.of(folder, "compare", *arguments)
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"modle": {}}, ["config key: 'modle'", "model, split, plan, trunk"]),
        ({"split": {"begin": 1}}, ["config key: 'split.begin'", "start, end"]),
        ({"split": {"start": 6}}, ["split.start: 6", "0 to 5 for 6 layers"]),
        ({"split": {"start": -1}}, ["split.start: -1", "greater than or equal to 0"]),
        ({"split": {"start": 3, "end": 3}}, ["split.end: 3", "4 to 6"]),
        ({"split": {"end": 7}}, ["split.end: 7", "to 6"]),
        ({"generation": {"max_new_tokens": 0}}, ["generation.max_new_tokens: 0"]),
        ({"generation": {"max_new_tokens": "x"}}, ["generation.max_new_tokens: 'x'", "integer"]),
        ({"trunk": {"link": "rtt=5"}}, ["trunk.link: 'rtt=5'", "rtt=5ms"]),
        ({"trunk": {"address": "x"}}, ["trunk.address: 'x'", "host:port"]),
        ({"model": {"name": "no-such-model"}}, ["model.name: 'no-such-model'", "smollm2-135m-instruct"]),
        ({"model": {"dtype": "float8"}}, ["model.dtype: 'float8'", "'float32', 'bfloat16' or 'float16'"]),
        ({"model": {"device": "cuda:99"}}, ["model.device: 'cuda:99'", "of this machine"]),
        ({"flags": "nonsense"}, ["flags: 'nonsense'", "use_cache"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_config_that_cannot_be_used_is_one_line_that_names_the_key(
    sections: dict[str, Any], words: list[str], folder: Path, refusal: Refusal
) -> None:
    usual = yaml.safe_load((folder / "config.yaml").read_text())
    changed = {
        name: {**usual.get(name, {}), **section} if isinstance(section, dict) else section
        for name, section in sections.items()
    }
    configured(folder, {**usual, **changed})
    said = refusal.of(folder, "compare")
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("content", "words"),
    [("a: [", "valid YAML"), ("- 1", "a YAML mapping"), ("\0", "valid YAML"), (None, "a readable file")],
)
def test_a_config_file_that_cannot_be_read_is_one_line(
    content: str | None, words: str, tmp_path: Path, refusal: Refusal
) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    said = refusal.of(tmp_path, "parts", "--config", str(path))
    assert str(path) in said
    assert words in said


def test_the_command_as_a_process_says_one_line_too(tmp_path: Path) -> None:
    for arguments in (["compare", "--max-new-tokens", "x"], ["compare", "--nonsense"], ["no-such-command"], []):
        done = run(tmp_path, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")


def test_a_trunk_that_is_not_there_is_one_line_with_what_to_do(folder: Path, refusal: Refusal) -> None:
    address = f"127.0.0.1:{free_port()}"
    said = refusal.of(folder, "compare", "--trunk", address)
    assert address in said
    assert "python -m server --config config.yaml" in said


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"dtype": "bfloat16"}}, ["dtype: it serves float32, this client has bfloat16"]),
        ({"split": {"start": 1}}, ["layers: it serves [2, 4), this client has [1, 4)"]),
    ],
)
def test_a_trunk_that_serves_something_else_is_one_line_that_names_it(
    sections: dict[str, Any], words: list[str], trunk: Trunk, files: ModelFiles, tmp_path: Path, refusal: Refusal
) -> None:
    configured(tmp_path, settings(files, trunk={"address": trunk.address}, **sections))
    said = refusal.of(tmp_path, "compare")
    assert trunk.address in said
    for word in words:
        assert word in said


def test_a_trunk_that_serves_another_model_is_one_line_that_names_both(
    trunk: Trunk, files: ModelFiles, tiny_model: TinyFactory, tmp_path: Path, refusal: Refusal
) -> None:
    other = tiny_model("qwen2")
    configured(tmp_path, settings(other, trunk={"address": trunk.address}))
    said = refusal.of(tmp_path, "compare")
    assert f"model: it serves {files.name}, this client has {other.name}" in said
    assert f"weights digest: it serves {files.digest[:12]}" in said


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_damaged_weights_are_one_line_that_names_the_file(
    how: str, files: ModelFiles, tmp_path: Path, refusal: Refusal
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(files.folder, copy)
    weights = copy / files.weights.name
    whole = bytearray(weights.read_bytes())
    if how == "missing":
        weights.unlink()
    else:
        whole[-5] ^= 1
        weights.write_bytes(whole if how == "flipped" else whole[:-100])
    configured(tmp_path, {"model": {"name": str(copy)}})
    for command in ("compare", "parts", "fetch"):
        said = refusal.of(tmp_path, command)
        assert str(weights) in said
        assert "Delete the folder" in said


def test_parts_as_json_adds_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert command_line.main(["parts", "--json", "--config", "config.yaml"]) == 0
    said = json.loads(capsys.readouterr().out)
    found = {part["name"]: part for part in said["parts"]}
    assert len(said["anatomy"]["layers"]) == 6
    assert set(found) == {"client bottom", "client top", "client", "trunk", "full"}
    assert found["client"]["parameters"] + found["trunk"]["parameters"] == found["full"]["parameters"]
    assert found["trunk"]["wire_bytes_per_token"] == 2 * 48 * 4
    monkeypatch.setenv("COLUMNS", "200")
    assert command_line.main(["parts", "--config", "config.yaml"]) == 0
    assert "KV per token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--client-memory", "much"], ["client_memory: 'much'", "300MB"]),
        (["--client-memory", "0MB"], ["client_memory: '0MB'"]),
        (["--measure", "4-26"], ["measure: '4-26'", "4:26,8:20"]),
        (["--measure", "4:26"], ["measure: '4:26'", "within 0:6"]),
        (["--measure", "1:4"], ["cut: '1:4'", "2:4, the layers that the trunk server has"]),
        (["--context", "0"], ["context: 0", "at least 1"]),
        (["--link", "slow"], ["link: 'slow'"]),
        (["--cuts", "--flags", "quick"], ["quick"]),
    ],
)
def test_parts_refuses_what_it_cannot_use_in_one_line(
    arguments: list[str], words: list[str], folder: Path, refusal: Refusal
) -> None:
    said = refusal.of(folder, "parts", *arguments)
    for word in words:
        assert word in said


def test_cuts_are_predicted_from_runs_and_those_asked_for_are_measured(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(configured(tmp_path, settings(files, trunk={"address": "embedded"})))
    command = ["parts", "--measure", "1:5", "--client-memory", "10GB", "--json", "--config", "config.yaml"]
    assert command_line.main(command) == 0
    said = json.loads(capsys.readouterr().out)["cuts"]
    assert len(said["cuts"]) == 6 * 7 // 2
    assert any(cut["pareto"] for cut in said["cuts"])
    assert said["advice"]["chosen"]["client_memory_bytes"] < 10e9
    assert "For a client of 10,000 MB, cut at" in said["advice"]["where_to_cut"]
    (run,) = said["measured"]
    (cost,) = [cut for cut in said["cuts"] if (cut["start"], cut["end"]) == (1, 5)]
    assert run["tpot_s"] > 0
    assert cost["client_memory_bytes"] == pytest.approx(run["client_memory_bytes"], rel=0.1)


def test_models_lists_the_catalogue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPLITLEARN_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    assert command_line.main(["models"]) == 0
    said = capsys.readouterr().out
    for word in ("smollm2-135m-instruct", "gpt2", "Apache-2.0", "no"):
        assert word in said


def test_flags_lists_each_side(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    assert command_line.main(["flags", "--config", "config.yaml"]) == 0
    said = capsys.readouterr().out
    for word in ("use_cache", "applied", "needs a CUDA device", "does not act on this side"):
        assert word in said


def test_flags_as_json_is_one_object_with_each_flag_and_side(
    folder: Path, capsys: pytest.CaptureFixture[str], refusal: Refusal
) -> None:
    assert command_line.main(["flags", "--json", "--config", str(folder / "config.yaml")]) == 0
    found = {flag["name"]: flag for flag in json.loads(capsys.readouterr().out)["flags"]}
    assert list(found) == list(FLAGS)
    assert found["use_cache"]["full"] == {"state": "applied", "choice": "on", "reason": None}
    assert found["use_fast"]["trunk"] == {"state": "unavailable", "choice": None, "reason": "does not act on this side"}
    assert "without --json" in refusal.of(folder, "flags", "--json", "--markdown")


def test_models_as_json_is_one_object_with_the_catalogue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPLITLEARN_CACHE", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    assert command_line.main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cache"].startswith(str(tmp_path))
    assert [(model["name"], model["folder"]) for model in found["models"]] == [(each.name, None) for each in CATALOGUE]


def test_the_page_of_flags_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["flags", "--markdown"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "flags.md").read_text()
