"""config.yaml: what is written there is what is used, and what is wrong is named as it is written."""

import json
from pathlib import Path

import pytest

from splitlearn import config
from splitlearn.errors import InputError

ROOT = Path(__file__).parent.parent


def test_the_file_in_the_repository_says_the_defaults() -> None:
    assert config.load(ROOT / "config.yaml") == config.Config() == config.load(None)


@pytest.mark.parametrize("given", ["a:1, b:2", ["a:1", "b:2"], ("a:1", "b:2")])
def test_a_trunk_may_have_several_addresses(given: object) -> None:
    parsed = config.parse({"trunk": {"address": given}})
    assert parsed.trunk.address == ("a:1", "b:2")
    assert not parsed.trunk.embedded
    assert config.parse(json.loads(parsed.model_dump_json())) == parsed == config.with_trunk(config.Config(), "a:1,b:2")


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"modle": {}}, "modle"),
        ({"split": {"strat": 1}}, "split.strat"),
        ({"split": {"start": -1}}, "split.start"),
        ({"split": {"start": "two"}}, "split.start"),
        ({"split": "fast"}, "split: 'fast'"),
        ({"split": ["auto"]}, "split"),
        ({"split": {"auto": True}}, "split.auto"),
        ({"plan": {"objective": "speed"}}, "plan.objective"),
        ({"model": {"dtype": "int3"}}, "model.dtype"),
        ({"model": {"device": "tpu"}}, "model.device"),
        ({"trunk": {"address": "nowhere"}}, "trunk.address"),
        ({"trunk": {"address": "host:99999"}}, "trunk.address"),
        ({"trunk": {"address": []}}, "trunk.address"),
        ({"trunk": {"address": "ray://host"}}, "trunk.address"),
        ({"trunk": {"address": ["ray://a:1", "b:1"]}}, "trunk.address"),
        ({"ray": {"layers": []}}, "ray.layers"),
        ({"ray": {"layers": [[2, 4], [5, 6]]}}, "start 4, where the link before ends: link 2"),
        ({"ray": {"min_replicas": 3}}, "ray: {'min_replicas': 3} cannot be used; expected max_replicas"),
        ({"ray": {"num_cpus": 0}}, "ray.num_cpus"),
        ({"trunk": {"address": ["a:1", "a:1"]}}, "trunk.address"),
        ({"trunk": {"address": ["a:1", "embedded"]}}, "trunk.address"),
        ({"ui": {"port": 70000}}, "ui.port"),
        ({"generation": {"max_new_tokens": 0}}, "generation.max_new_tokens"),
        ({"ui": {"auth": "user:password"}}, "ui.auth"),
    ],
)
def test_what_is_wrong_is_named_as_it_is_written(data: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named.replace(".", r"\.")):
        config.parse(data)


@pytest.mark.parametrize(("text", "named"), [("a: [", "YAML"), ("- 1", "mapping"), ("\xff\xfe", "YAML")])
def test_a_file_that_is_no_settings_is_refused(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=named):
        config.load(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.yaml"):
        config.load(tmp_path / "missing.yaml")
