"""`splitlearn plan`: what it prints, and the one line that it says for what it cannot use."""

from pathlib import Path

import pytest
import yaml

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.cli import main as command_line
from tests.support.trunk import settings

FIGURES = {"base": "10MB", "weight_ratio": 1, "decode_ms": 4, "prefill_ms": 0.4, "step_ms": 6, "start_ms": 10}
DESK = {**FIGURES, "memory": "1GB", "decode_ms": 0.5, "address": "desk:50051"}
FILE = {
    "devices": {"laptop": {**FIGURES, "memory": "1GB"}, "desk": DESK},
    "links": [{"between": ["laptop", "desk"], "rtt_ms": 2, "up_mbit": 100, "down_mbit": 100}],
}


@pytest.fixture
def folder(files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a config.yaml for the tiny model and a devices.yaml."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dict(settings(files))))
    (tmp_path / "devices.yaml").write_text(yaml.safe_dump(FILE, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(*arguments: str) -> int:
    return command_line.main(["plan", "--devices", "devices.yaml", "--config", "config.yaml", *arguments])


def test_a_plan_is_said_with_its_route_its_times_and_lines_to_paste(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan() == 0
    said = capsys.readouterr().out
    for words in ("Splitting is better", "laptop > desk [0, 6) > laptop", "TPOT", "split: {start: 0, end: 6}"):
        assert words in said


def test_a_route_through_several_servers_has_the_lines_of_each(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {**DESK, "memory": "10.4MB"}
    devices = {"laptop": {**FIGURES, "memory": "10.4MB"}, "desk": small, "rack": {**small, "address": "rack:50051"}}
    near = {"rtt_ms": 2, "up_mbit": 100, "down_mbit": 100}
    links = [{"between": pair, **near} for pair in (["laptop", "desk"], ["laptop", "rack"], ["desk", "rack"])]
    (folder / "devices.yaml").write_text(yaml.safe_dump({"devices": devices, "links": links}, sort_keys=False))
    assert plan("--objective", "memory") == 0
    said = capsys.readouterr().out
    for words in ("# laptop, the client", "layers: [0, 3]", "# desk, a trunk server", "# rack, a trunk server"):
        assert words in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--objective", "speed"], ["objective: 'speed'", "tpot, ttft, memory, throughput"]),
        (["--prompt-tokens", "0"], ["prompt_tokens: 0"]),
        (["--context", "-1"], ["context: -1"]),
        (["--flags", "none"], ["flags: 'none'", "--measure"]),
        (["--devices", "none.yaml"], ["devices: 'none.yaml'", "a readable file"]),
    ],
)
def test_what_cannot_be_used_is_one_line(
    arguments: list[str], words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(*arguments) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert said.out == ""
    for word in words:
        assert word in line
