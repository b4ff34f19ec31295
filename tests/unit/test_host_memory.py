"""Free memory as a container sees it. CPU only; control groups are trees of files written here."""

from __future__ import annotations

import pytest

from sgl_blend.host_memory import UNKNOWN, available_memory
from sgl_blend.store.errors import ArenaExhausted
from sgl_blend.store.wire import shm

GiB = 1 << 30
NO_LIMIT_V1 = 9223372036854771712


class Machine:
    """A tree with ``proc`` and ``sys``. v2 is mounted at /sys/fs/cgroup unless told otherwise."""

    def __init__(self, root, free: int = 64 * GiB):
        self.root = root
        self.write("proc/meminfo", f"MemTotal: 99999999 kB\nMemAvailable: {free // 1024} kB\n")

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def runs_in(self, *groups: str) -> None:
        self.write("proc/self/cgroup", "".join(g + "\n" for g in groups))

    def mounts(self, *lines: str) -> None:
        self.write("proc/self/mountinfo", "".join(line + "\n" for line in lines))

    def v2(self, folder: str, limit: str, used: int, *, cache: int = 0, high: str = "max") -> None:
        for name, text in (("max", limit), ("high", high), ("current", str(used))):
            self.write(f"{folder}/memory.{name}", text + "\n")
        self.write(f"{folder}/memory.stat", f"anon 1\ninactive_file {cache}\nactive_file 7\n")

    def v1(self, folder: str, limit: int, used: int, *, cache: int = 0) -> None:
        self.write(f"{folder}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{folder}/memory.usage_in_bytes", f"{used}\n")
        self.write(f"{folder}/memory.stat", f"inactive_file 3\ntotal_inactive_file {cache}\n")

    def available(self) -> int:
        return available_memory(self.root)


V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 31 0:32 {shows} /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory"


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_without_groups_it_is_the_machines(machine):
    assert machine.available() == 64 * GiB


def test_without_proc_there_is_no_bound(tmp_path):
    assert available_memory(tmp_path) == UNKNOWN


def test_v2_container_with_its_own_namespace(machine):
    machine.runs_in("0::/")
    machine.mounts(V2_MOUNT)
    machine.v2("sys/fs/cgroup", str(8 * GiB), 3 * GiB)
    assert machine.available() == 5 * GiB


def test_the_tightest_of_nested_groups_counts(machine):
    machine.runs_in("0::/kube.slice/pod.slice/box.scope")
    machine.mounts(V2_MOUNT)
    top = "sys/fs/cgroup/kube.slice"
    machine.v2(top, str(32 * GiB), 20 * GiB)
    machine.v2(f"{top}/pod.slice", str(6 * GiB), 4 * GiB)
    machine.v2(f"{top}/pod.slice/box.scope", "max", 1 * GiB)
    assert machine.available() == 2 * GiB


def test_a_neighbour_in_the_outer_group_counts(machine):
    """The inner group is far below its own limit; the outer one is nearly full."""
    machine.runs_in("0::/pod/box")
    machine.mounts(V2_MOUNT)
    machine.v2("sys/fs/cgroup/pod", str(16 * GiB), 15 * GiB)
    machine.v2("sys/fs/cgroup/pod/box", str(16 * GiB), 1 * GiB)
    assert machine.available() == 1 * GiB


def test_page_cache_that_can_go_is_free(machine):
    machine.runs_in("0::/")
    machine.mounts(V2_MOUNT)
    machine.v2("sys/fs/cgroup", str(8 * GiB), 7 * GiB, cache=4 * GiB)
    assert machine.available() == 5 * GiB


def test_memory_high_is_a_limit_too(machine):
    machine.runs_in("0::/")
    machine.mounts(V2_MOUNT)
    machine.v2("sys/fs/cgroup", str(8 * GiB), 1 * GiB, high=str(4 * GiB))
    assert machine.available() == 3 * GiB


def test_a_group_over_its_limit_leaves_nothing(machine):
    machine.runs_in("0::/")
    machine.mounts(V2_MOUNT)
    machine.v2("sys/fs/cgroup", str(2 * GiB), 3 * GiB)
    assert machine.available() == 0


def test_a_machine_fuller_than_its_groups(tmp_path):
    machine = Machine(tmp_path, free=1 * GiB)
    machine.runs_in("0::/")
    machine.mounts(V2_MOUNT)
    machine.v2("sys/fs/cgroup", str(8 * GiB), 1 * GiB)
    assert machine.available() == 1 * GiB


def test_v2_mount_that_shows_a_part(machine):
    """A container without a namespace of its own: the path is the host's, the mount is not."""
    machine.runs_in("0::/docker/abc/inner")
    machine.mounts("31 23 0:28 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw")
    machine.v2("sys/fs/cgroup", str(8 * GiB), 2 * GiB)
    machine.v2("sys/fs/cgroup/inner", str(5 * GiB), 2 * GiB)
    assert machine.available() == 3 * GiB


def test_v2_process_outside_its_namespace(machine):
    machine.runs_in("0::/../other")
    machine.mounts(V2_MOUNT)
    machine.v2("sys/fs/cgroup", str(8 * GiB), 2 * GiB)
    assert machine.available() == 6 * GiB


def test_v1_nested(machine):
    machine.runs_in("9:name=systemd:/", "4:cpu,memory:/docker/abc/inner", "3:cpuset:/other")
    machine.mounts(
        "33 31 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset",
        V1_MOUNT.format(shows="/"),
    )
    top = "sys/fs/cgroup/memory"
    machine.v1(top, NO_LIMIT_V1, 40 * GiB)
    machine.v1(f"{top}/docker", NO_LIMIT_V1, 30 * GiB)
    machine.v1(f"{top}/docker/abc", 4 * GiB, 3 * GiB, cache=1 * GiB)
    machine.v1(f"{top}/docker/abc/inner", 3 * GiB, 1 * GiB // 2)
    assert machine.available() == 2 * GiB


def test_v1_container_mount(machine):
    machine.runs_in("4:memory:/docker/abc")
    machine.mounts(V1_MOUNT.format(shows="/docker/abc"))
    machine.v1("sys/fs/cgroup/memory", 4 * GiB, 1 * GiB)
    assert machine.available() == 3 * GiB


def test_v1_and_v2_side_by_side(machine):
    """Hybrid hierarchies: memory is managed by v1, and v2's folder has no memory files."""
    machine.runs_in("4:memory:/box", "0::/box")
    machine.mounts(
        V1_MOUNT.format(shows="/"),
        "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
    )
    machine.write("sys/fs/cgroup/unified/box/cgroup.procs", "1\n")
    machine.v1("sys/fs/cgroup/memory", NO_LIMIT_V1, 9 * GiB)
    machine.v1("sys/fs/cgroup/memory/box", 4 * GiB, 3 * GiB)
    assert machine.available() == 1 * GiB


def test_a_mount_point_with_a_blank(machine):
    machine.runs_in("0::/")
    machine.mounts(r"31 23 0:28 / /sys/my\040groups rw - cgroup2 cgroup2 rw")
    machine.v2("sys/my groups", str(8 * GiB), 6 * GiB)
    assert machine.available() == 2 * GiB


def test_this_machine_answers():
    assert 0 < available_memory() < UNKNOWN


def test_the_store_stays_within_its_group(machine, monkeypatch):
    """The arena asks before it grows: a group's limit is an error there, not the OOM killer."""
    machine.runs_in("0::/")
    machine.mounts(V2_MOUNT)
    machine.v2("sys/fs/cgroup", str(8 * GiB), 8 * GiB - (80 << 20))
    monkeypatch.setattr(shm, "available_memory", machine.available)
    arena = shm.Arena(256 << 20)
    try:
        with pytest.raises(ArenaExhausted, match="control group"):
            arena.ensure(1 << 20)
        assert arena.backed == 0
        machine.v2("sys/fs/cgroup", str(8 * GiB), 0)
        arena.ensure(1 << 20)
        assert arena.backed >= 1 << 20
    finally:
        arena.close()
