"""What a process may use is read off its control groups, of either version and any depth; nonsense limits nothing."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
import torch

from splitlearn.errors import ModelError
from splitlearn.models.plan import SplitPlan
from splitlearn.runtime import cgroups, hardware, process
from splitlearn.stages.loading import Placement, client_specs, full_specs, load, trunk_specs
from splitlearn.stages.settings import LoadSettings
from tests.conftest import TinyFactory
from tests.support.children import output_of
from tests.support.trunk import serve_here

GB = 1_000_000_000
V1 = "31 23 0:28 {top} /sys/fs/cgroup/{name} rw,relatime - cgroup cgroup rw,{name}\n"
V2 = "41 31 0:38 {top} /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"


def made(root: Path, groups: str, mounts: str, files: Mapping[str, str]) -> Path:
    """A folder that stands for `/`, with control groups in it."""
    for name, text in {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def v1(root: Path, group: str, files: Mapping[str, str], top: str = "/") -> Path:
    mounts = V1.format(top=top, name="cpu") + V1.format(top=top, name="memory")
    folders = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    return made(root, f"4:memory:{group}\n1:cpu,cpuacct:{group}\n0::/\n", mounts, folders)


def v2(root: Path, group: str, files: Mapping[str, str]) -> Path:
    folders = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    return made(root, f"0::{group}\n", V2.format(top="/"), folders)


def test_the_quota_of_cpu_time_decides_of_either_version(tmp_path: Path) -> None:
    one = v1(tmp_path / "1", "/a", {"cpu/a/cpu.cfs_quota_us": "50000\n", "cpu/a/cpu.cfs_period_us": "100000\n"})
    two = v2(tmp_path / "2", "/a", {"a/cpu.max": "25000 50000\n"})
    assert cgroups.cpu_quota(one) == cgroups.cpu_quota(two) == cgroups.cpus(two) == 0.5


def test_the_tightest_of_all_groups_above_holds(tmp_path: Path) -> None:
    cpu = {"a/b/c/cpu.max": "max 100000", "a/b/cpu.max": "150000 100000", "a/cpu.max": "400000 100000"}
    memory = {"a/b/c/memory.max": "max", "a/b/memory.max": str(3 * GB), "a/memory.high": str(2 * GB)}
    root = v2(tmp_path, "/a/b/c", {**cpu, **memory})
    assert (cgroups.cpu_quota(root), cgroups.memory_limit(root)) == (1.5, 2 * GB)


def test_a_container_s_own_mount_is_its_group_and_a_group_elsewhere_is_not_looked_for(tmp_path: Path) -> None:
    files = {"memory/memory.limit_in_bytes": str(GB), "memory/docker/x/memory.limit_in_bytes": "5"}
    for number, (group, top) in enumerate(
        (("/docker/x", "/docker/x"), ("/", "/"), ("/../../y", "/"), ("/y", "/docker"))
    ):
        assert cgroups.memory_limit(v1(tmp_path / str(number), group, files, top)) == GB


def test_a_pod_s_limit_holds_where_its_container_sees_no_group_above(tmp_path: Path) -> None:
    stat = f"total_inactive_file 0\nhierarchical_memory_limit {GB}\n"
    files = {"memory.limit_in_bytes": "9223372036854771712", "memory.usage_in_bytes": str(GB // 4), "memory.stat": stat}
    root = v1(tmp_path, "/pod/c", {f"memory/{name}": text for name, text in files.items()}, top="/pod/c")
    assert (cgroups.memory_limit(root), cgroups.available_memory(root)) == (GB, GB * 3 // 4)


def test_what_is_left_is_the_limit_less_what_is_used_but_for_idle_file_cache(tmp_path: Path) -> None:
    old = {"memory.limit_in_bytes": GB, "memory.usage_in_bytes": GB // 2}
    stat = f"cache 5\ninactive_file 1\ntotal_inactive_file {GB // 4}\n"
    one = v1(tmp_path / "1", "/", {"memory/memory.stat": stat} | {f"memory/{key}": str(old[key]) for key in old})
    new = {"a/memory.max": str(GB), "a/memory.current": str(GB // 2), "a/memory.stat": f"inactive_file {GB // 4}\n"}
    assert cgroups.available_memory(one) == cgroups.available_memory(v2(tmp_path / "2", "/a", new)) == GB * 3 // 4
    over = {"memory.max": str(GB), "memory.current": str(2 * GB)}
    assert cgroups.available_memory(v2(tmp_path / "3", "/", over)) == 0


@pytest.mark.parametrize(
    "text", ["max", "-1", "", "0", "nonsense", "9223372036854771712", "1e9", "٣", "\x00", "9" * 40]
)
def test_what_is_no_limit_limits_nothing(text: str, tmp_path: Path) -> None:
    files = {"memory.max": text, "memory.high": text, "memory.current": "5", "cpu.max": f"{text} 100000"}
    root = v2(tmp_path / "2", "/a", {f"a/{name}": value for name, value in files.items()})
    old = {"memory/memory.limit_in_bytes": text, "cpu/cpu.cfs_quota_us": text, "cpu/cpu.cfs_period_us": "100000"}
    for found in (root, v1(tmp_path / "1", "/", old), made(tmp_path / "3", text, text, {}), tmp_path / "nowhere"):
        assert cgroups.cpus(found) == min(len(os.sched_getaffinity(0)), cgroups.cpu_quota(found) or 1 << 20)
        said = cgroups.machine(found)
        assert (said.memory_limit, said.quota, said.memory) == (None, None, psutil.virtual_memory().total)
        assert cgroups.available_memory(found) > 0


@pytest.mark.parametrize(("quota", "threads"), [(0.5, 1), (1.0, 1), (1.5, 1), (0.01, 1)])
def test_less_than_two_cores_are_one_thread(quota: float, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "cpu_quota", lambda root=cgroups.ROOT: quota)
    assert process.default_threads() == threads


def test_the_machine_and_its_limits_are_said_in_words() -> None:
    assert str(cgroups.Machine(2, 24 * GB, quota=0.5, memory_limit=GB * 3 / 2)) == (
        "0.5 of 2 cores (cgroup limit), 1.5 of 24 GB"
    )
    assert str(cgroups.Machine(8, 24 * GB, quota=4, affinity=2)) == "2 of 8 cores (affinity), 24 GB"
    assert str(cgroups.Machine(1, 24 * GB)) == "1 core, 24 GB"


def test_what_a_trunk_says_of_its_machine_is_read_and_nonsense_is_left_out() -> None:
    said = {"logical_cores": "2", "memory_bytes": str(24 * GB), "cpu_quota": "0.5", "memory_limit_bytes": str(GB)}
    assert hardware.usable(said) == "0.5 of 2 cores (cgroup limit), 1 of 24 GB"
    assert hardware.usable(hardware.describe()) == str(cgroups.machine())
    for wrong in ({}, {"logical_cores": "2"}, {**said, "cpu_quota": "<b>"}, {**said, "memory_bytes": "inf"}):
        assert hardware.usable(wrong) == ""


@pytest.mark.parametrize("kind", ["full", "client", "trunk"])
def test_weights_that_would_not_fit_are_refused_before_they_are_read(
    kind: str, tiny_model: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, plan = tiny_model(), SplitPlan(2, 4, 6)
    specs = {"full": full_specs(6), "client": client_specs(plan), "trunk": trunk_specs(plan)}[kind]
    here = Placement(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(cgroups, "available_memory", lambda: 90_000_000)
    with pytest.raises(ModelError, match=r"Too little memory: .* 0\.09 GB can be had .*What helps: "):
        load(files, specs, LoadSettings(), here)
    monkeypatch.setattr(cgroups, "available_memory", lambda: GB)
    assert load(files, specs, LoadSettings(), here).stages


def test_a_trunk_s_kv_memory_is_a_share_of_what_can_be_had(
    tiny_model: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "available_memory", lambda: GB)
    with serve_here(tiny_model()) as here:
        pool = here.runtime.admission.pool
        rows = 3 * here.runtime.files.facts.hidden_size * 4 * pool.capacity  # what steps under way may hold beside it
        taken = rows + sum(view.nbytes for view in pool.views(0, pool.capacity))
    assert GB // 4 - taken < taken // pool.n_blocks and taken <= GB // 4


@pytest.mark.skipif(not os.access("/sys/fs/cgroup/cpu", os.W_OK), reason="needs a cgroup v1 that can be written")
def test_a_real_group_is_seen_by_a_process_in_it() -> None:
    own = f"splitlearn-test-{os.getpid()}"
    folders = [Path("/sys/fs/cgroup") / name / own for name in ("cpu", "memory")]
    for folder in folders:
        folder.mkdir()
    try:
        (folders[0] / "cpu.cfs_quota_us").write_text("50000")
        (folders[1] / "memory.limit_in_bytes").write_text(str(1 << 30))
        code = (
            "from splitlearn.runtime import cgroups as c, process; "
            "print(c.memory_limit(), c.cpus(), process.default_threads())"
        )
        groups = " ".join(f"{folder}/cgroup.procs" for folder in folders)
        join = f'for f in {groups}; do echo $$ >$f; done; exec "$@"'
        said = output_of(["sh", "-c", join, "sh", sys.executable, "-c", code])
    finally:
        for folder in folders:
            folder.rmdir()
    assert said.split() == [str(1 << 30), "0.5", "1"]
