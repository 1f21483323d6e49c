"""The container files: what can be read off them, and, marked `compose`, the stack brought up for real.

Bringing it up takes minutes, so that `make test` leaves it to `make test-compose`.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.__main__ import app as server
from tests.support.children import output_of
from tests.support.page import CHROMIUM

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
# A helper that lies beside the project where its developers work, and is no part of it.
BRING_UP = ROOT.parent / "shared" / "tools" / "compose-e2e"


@pytest.mark.parametrize(
    "command",
    [
        ["hadolint", "Dockerfile"],
        ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml", "compose.gpu.yaml"],
        ["yamllint", "--strict", "."],
    ],
    ids=lambda command: command[0],
)
def test_container_and_yaml_files_pass_their_linter(command: list[str]) -> None:
    output_of([BIN / command[0], *command[1:]])


@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"]], ids=["base", "gpu"])
def test_compose_accepts_the_files(files: list[str]) -> None:
    compose = ["docker", "compose"]
    if shutil.which("docker") is None or subprocess.run([*compose, "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not installed")
    options = [word for name in files for word in ("-f", name)]
    output_of([*compose, *options, "config", "-q"])


def test_the_page_and_prometheus_are_published_on_loopback_and_nothing_else_is() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert {name: service.get("ports") for name, service in services.items()} == {
        "trunk": None,
        "app": ["127.0.0.1:7860:7860"],
        "prometheus": ["127.0.0.1:9090:9090"],
        "ray-head": None,
        "ray-worker": None,
    }
    assert services["prometheus"]["profiles"] == ["metrics"]


def test_a_ray_cluster_is_a_head_and_two_workers_in_a_profile_of_their_own() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    head, worker = services["ray-head"], services["ray-worker"]
    for each in (head, worker):
        assert each["profiles"] == ["ray"]
        assert each["image"] == "splitlearn:ray" != services["app"]["image"]
        assert (ROOT / each["build"]["args"]["MORE_REQUIREMENTS"]).exists()
        assert each["cap_drop"] == ["ALL"] and "ports" not in each
    assert worker["deploy"]["replicas"] == 2
    assert "--address ray-head:6379" in worker["command"][-1]
    check_server(head["command"][-1])


def test_the_manifest_for_kuberay_runs_the_program_on_the_head_and_lets_nobody_else_at_rays_ports() -> None:
    cluster, service, policy = yaml.safe_load_all((ROOT / "docs/kuberay.yaml").read_text(encoding="utf-8"))
    assert [each["kind"] for each in (cluster, service, policy)] == ["RayCluster", "Service", "NetworkPolicy"]
    assert f"ray=={cluster['spec']['rayVersion']}" in (ROOT / "requirements-ray.txt").read_text(encoding="utf-8")
    (head,) = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    (workers,) = cluster["spec"]["workerGroupSpecs"]
    (worker,) = workers["template"]["spec"]["containers"]
    assert cluster["metadata"]["annotations"] == {"ray.io/overwrite-container-cmd": "true"}
    assert all("$KUBERAY_GEN_RAY_START_CMD" in each["args"][0] for each in (head, worker))
    assert "--allow-open" not in check_server(head["args"][0])
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    labels = cluster["spec"]["headGroupSpec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert service["spec"]["ports"][0]["targetPort"] in [port["name"] for port in head["ports"]]
    assert policy["spec"]["podSelector"]["matchLabels"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    inside, outside = policy["spec"]["ingress"]
    assert inside["from"] == [{"podSelector": policy["spec"]["podSelector"]}]
    assert [port["port"] for port in outside["ports"]] == [50051, 50100]


def check_server(script: str) -> list[str]:
    """The words of the trunk server's command in a shell script, which its command line takes."""
    words = shlex.split(script.partition("python -m server")[2].replace("/etc/splitlearn/", f"{ROOT}/"))
    found = server(args=words, prog_name="server", standalone_mode=False)
    assert callable(found) and "--ray" in words
    return words


def test_both_services_are_let_open_by_name_since_they_listen_on_the_stacks_network() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    for name in ("trunk", "app"):
        assert "--host 0.0.0.0" in services[name]["command"]
        assert "--allow-open" in services[name]["command"]


def test_the_image_runs_as_a_user_with_a_number() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    last = [line.split()[1] for line in lines if line.startswith("USER ")][-1]
    user, group = last.split(":")
    assert int(user) > 0
    assert int(group) > 0


def observed(drive: str, folder: Path, **environment: str) -> dict[str, Any]:
    """What the module `drive` saw of the running stack."""
    if not BRING_UP.exists():
        pytest.skip(f"{BRING_UP} is missing, which brings a stack up without a Docker engine")
    if shutil.which("iptables") is None or not CHROMIUM.exists():
        pytest.skip(f"iptables or {CHROMIUM.name} is not installed")
    out = folder / "seen.json"
    words = ["env", "-C", str(ROOT), sys.executable, "-m", drive, str(out)]
    run = subprocess.run(
        [BRING_UP, ROOT, "--", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )
    assert run.returncode == 0, run.stdout[-8000:]
    seen: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return observed("tests.support.compose_drive", tmp_path_factory.mktemp("compose"))


@pytest.mark.compose
@pytest.mark.timeout(1800)
class TestStack:
    def test_the_page_answers_on_the_published_port(self, seen: dict[str, Any]) -> None:
        assert seen["status"] == 200

    def test_both_containers_become_healthy(self, seen: dict[str, Any]) -> None:
        assert seen["health"] == {"trunk": "healthy", "app": "healthy"}

    def test_no_container_runs_as_root(self, seen: dict[str, Any]) -> None:
        assert seen["users"] == {"trunk": "10001", "app": "10001"}

    def test_the_trunk_is_not_published(self, seen: dict[str, Any]) -> None:
        assert not seen["trunk_published"]

    def test_a_comparison_runs_through_the_trunks_container(self, seen: dict[str, Any]) -> None:
        found = seen["comparison"]
        assert found["identical_tokens"]
        assert found["split_run"]["trunk_address"] == "trunk:50051"
        assert found["split_run"]["n_tokens"] == 16

    def test_the_button_on_the_page_compares_through_the_trunks_container(self, seen: dict[str, Any]) -> None:
        assert "Identical" in seen["page"]["first"]

    def test_an_answer_whose_trunk_is_killed_and_started_again_is_completed(self, seen: dict[str, Any]) -> None:
        assert "Identical" in seen["page"]["cut"]
        assert "was lost at token" in seen["page"]["cut"]

    def test_a_killed_trunk_is_an_error_on_the_page_and_one_that_comes_back_is_used(self, seen: dict[str, Any]) -> None:
        assert "trunk:50051" in seen["page"]["killed"]
        assert "Identical" in seen["page"]["back"]

    def test_the_overlay_gives_both_services_a_gpu_and_an_image_of_their_own(self, seen: dict[str, Any]) -> None:
        for service in seen["with_gpu"].values():
            assert service["image"] == "splitlearn:cuda"
            assert service["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]

    def test_the_stack_stops_before_it_is_killed(self, seen: dict[str, Any]) -> None:
        assert seen["stop_s"] < 10  # what compose waits before it kills


@pytest.mark.compose
@pytest.mark.timeout(1800)
def test_the_profile_ray_runs_a_trunk_on_a_worker_and_another_one_when_that_worker_is_lost(tmp_path: Path) -> None:
    seen = observed("tests.support.compose_ray", tmp_path, COMPOSE_PROFILES="ray", COMPOSE_E2E_UP_S="600")
    assert seen["user"] == "10001"
    for address, found in ((seen["first"], seen["comparison"]), (seen["second"], seen["again"])):
        assert found["identical_tokens"] and found["split_run"]["n_tokens"] == 16
        assert found["split_run"]["trunk_address"] == address
    assert seen["first"] != seen["second"]  # on the other worker, or on this one once compose has started it again
    assert seen["drivers"] == [True, False]  # with the token, and with another one
    assert "draining" in seen["logs"]
    assert seen["stop_s"] < 60  # what compose waits before it kills
