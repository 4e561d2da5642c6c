"""The memory of a machine within the limits of its control groups, and what reported numbers carry."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dlrm.machine import available_memory, environment, peak_rss_bytes, total_memory

GIB = 1 << 30


def test_environment_names_machine_versions_and_command():
    values = environment()
    assert values["torch"] == torch.__version__
    assert {"command", "machine", "python", "numpy"} <= values.keys()


def test_peak_memory_sees_an_allocation():
    before = peak_rss_bytes()
    np.ones(max(0, before) // 8 + (1 << 25)).sum()  # more than everything so far, and 256 MB
    assert peak_rss_bytes() > before + (1 << 27)


def make_proc(folder, mountinfo="", cgroup=""):
    """A /proc of a machine with 64 GiB, 48 of them free."""
    (folder / "self").mkdir(parents=True)
    (folder / "meminfo").write_text(f"MemTotal: {64 << 20} kB\nMemAvailable: {48 << 20} kB\nHugePages_Total: 0\n")
    (folder / "self/mountinfo").write_text(mountinfo)
    (folder / "self/cgroup").write_text(cgroup)
    return folder


def make_group(folder, version, limit, used, cache):
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}[version]
    cache_name = {1: "total_inactive_file", 2: "inactive_file"}[version]
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used)):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{cache_name} {cache}\n")


def mount_line(version, root, mount_point):
    options = {1: "cgroup cgroup rw,memory", 2: "cgroup2 cgroup2 rw"}[version]
    return f"35 31 0:32 {root} {mount_point} rw,relatime - {options}\n"


def membership_line(version, path):
    return {1: "4:cpu,memory:", 2: "0::"}[version] + f"{path}\n"


UNLIMITED = {1: 9223372036854771712, 2: "max"}


@pytest.mark.parametrize("version", [1, 2])
def test_memory_is_that_of_the_machine_without_limits(tmp_path, version):
    make_group(tmp_path / "groups/own", version, UNLIMITED[version], 5 * GIB, 0)
    proc = make_proc(tmp_path / "proc", mount_line(version, "/", tmp_path / "groups"), membership_line(version, "/own"))
    assert (total_memory(proc), available_memory(proc)) == (64 * GIB, 48 * GIB)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("limited", ["own", "above", "mount point"])
def test_memory_is_limited_by_the_group_and_those_above_it(tmp_path, version, limited):
    folders = {"own": "groups/job/own", "above": "groups/job", "mount point": "groups"}
    for name, folder in folders.items():
        limit = 8 * GIB if name == limited else UNLIMITED[version]
        make_group(tmp_path / folder, version, limit, 5 * GIB, GIB)
    proc = make_proc(
        tmp_path / "proc", mount_line(version, "/", tmp_path / "groups"), membership_line(version, "/job/own")
    )
    assert total_memory(proc) == 8 * GIB
    assert available_memory(proc) == (8 - 5 + 1) * GIB, "file cache is free memory"


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("root", "path"), [("/docker/7", "/docker/7"), ("/docker/7", "/other"), ("/", "/../x")])
def test_memory_in_a_container_that_sees_only_its_own_group(tmp_path, version, root, path):
    make_group(tmp_path / "groups", version, 3 * GIB, GIB, 0)
    proc = make_proc(tmp_path / "proc", mount_line(version, root, tmp_path / "groups"), membership_line(version, path))
    assert (total_memory(proc), available_memory(proc)) == (3 * GIB, 2 * GIB)


def test_groups_of_other_controllers_do_not_limit_memory(tmp_path):
    make_group(tmp_path / "groups/own", 1, GIB, 0, 0)
    mount = f"35 31 0:32 / {tmp_path / 'groups'} rw - cgroup cgroup rw,cpu\n"
    proc = make_proc(tmp_path / "proc", mount, "3:cpu:/own\n")
    assert total_memory(proc) == 64 * GIB


def test_a_group_above_its_limit_has_nothing_left(tmp_path):
    make_group(tmp_path / "groups", 2, GIB, 2 * GIB, 0)
    proc = make_proc(tmp_path / "proc", mount_line(2, "/", tmp_path / "groups"), membership_line(2, "/"))
    assert available_memory(proc) == 0


def test_memory_without_proc(tmp_path):
    total, available = total_memory(tmp_path), available_memory(tmp_path)
    assert total == pytest.approx(2 * available, abs=1)
    assert 1e8 < total < 1e15


def test_memory_of_this_machine():
    assert 1e6 < available_memory() <= total_memory() < 1e15
    if Path("/proc/meminfo").exists():
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        assert total_memory() <= int(fields["MemTotal"].split()[0]) * 1024
