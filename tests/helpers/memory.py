"""The memory that calls leave behind."""

import os
from pathlib import Path

STATM = Path("/proc/self/statm")


def resident():
    """Bytes of memory in use."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(call, warm_up, count):
    """The least of two: a leak grows each time, the allocator's own memory once in a while."""
    for _ in range(warm_up):
        call()
    sizes = [resident()]
    for _ in range(2):
        for _ in range(count):
            call()
        sizes.append(resident())
    return min(sizes[1] - sizes[0], sizes[2] - sizes[1])
