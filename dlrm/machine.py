"""Facts about the machine: its memory, within the limits of containers, and the versions behind a reported number."""

import os
import platform
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

_PROC = Path("/proc")


def total_memory(proc: Path = _PROC) -> int:
    """Return the bytes that this process can ever have: the machine's memory, or a control group's limit if lower.

    Args:
        proc: the /proc file system to read.
    """
    installed = _meminfo(proc).get("MemTotal", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min([installed, *(group.limit for group in _memory_groups(proc))])


def available_memory(proc: Path = _PROC) -> int:
    """Return the bytes that this process can still take: what the machine has free, or a control group if less.

    File cache that the kernel would drop counts as free. Systems without /proc/meminfo do not tell; there, half of the
    installed memory is assumed to be free.

    Args:
        proc: the /proc file system to read.
    """
    free = _meminfo(proc).get("MemAvailable", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return max(min([free, *(group.limit - group.used for group in _memory_groups(proc))]), 0)


def peak_rss_bytes() -> int:
    """Return the most memory this process has held so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment() -> dict[str, Any]:
    """Return the machine, versions and command that every reported number carries."""
    return {
        "command": " ".join(sys.argv),
        "machine": f"{platform.machine()} {platform.system()}, {torch.get_num_threads()} threads",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


class _MemoryGroup(NamedTuple):
    limit: int
    used: int  # without file cache that the kernel would drop


class _Files(NamedTuple):
    """Names of a control group's files, which differ between version 1 and version 2."""

    limit: str
    used: str
    cache: str  # in memory.stat


_FILES = {
    "cgroup": _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    "cgroup2": _Files("memory.max", "memory.current", "inactive_file"),
}


def _meminfo(proc: Path) -> dict[str, int]:
    """Return the fields of /proc/meminfo in bytes; none where the system has no such file."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value.split()[0]) * 1024 for name, value in (line.split(":") for line in lines)}


def _memory_groups(proc: Path) -> Iterator[_MemoryGroup]:
    """Yield the control groups that limit this process's memory: its own one and those above it."""
    try:
        mounts = (proc / "self/mountinfo").read_text().splitlines()
        memberships = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for mount in mounts:
        # "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw": see proc_pid_mountinfo(5).
        left, _, right = mount.partition(" - ")
        root, mount_point = left.split()[3:5]
        kind, _, options = right.split(maxsplit=2)
        if kind not in _FILES or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        for membership in memberships:
            _, controllers, path = membership.split(":", 2)
            # Version 2 has one hierarchy, whose line names no controller.
            if (kind == "cgroup2") if not controllers else (kind == "cgroup" and "memory" in controllers.split(",")):
                yield from _groups_above(Path(mount_point), Path(root), Path(path), _FILES[kind])


def _groups_above(mount_point: Path, root: Path, path: Path, files: _Files) -> Iterator[_MemoryGroup]:
    # A container sees only the hierarchy below ``root``. If the group is outside, the mount point is all there is.
    below = path.relative_to(root) if path.is_relative_to(root) and ".." not in path.parts else Path()
    for folder in [mount_point / below, *(mount_point / parent for parent in below.parents)]:
        try:
            limit = (folder / files.limit).read_text().strip()
            if limit == "max":
                continue
            used = int((folder / files.used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:  # the root group has no such files
            continue
        yield _MemoryGroup(int(limit), used - int(stat.get(files.cache, 0)))
