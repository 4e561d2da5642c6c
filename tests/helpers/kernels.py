"""Which of the CPU kernels run, for tests that compare them."""

from contextlib import contextmanager

import pytest
import torch

import robe
from robe.backends import set_instruction_set

BACKEND = robe.backend()["cpu"]
IS_NATIVE = BACKEND.startswith("native")
needs_kernels = pytest.mark.skipif(not IS_NATIVE, reason=f"compares the compiled kernels, but {BACKEND} runs")


def instruction_set():
    return robe.backend()["cpu"].removeprefix("native (").removesuffix(")")


def usable(name):
    in_use = instruction_set()
    try:
        set_instruction_set(name)
    except ValueError:
        return False
    set_instruction_set(in_use)
    return True


SETS = [name for name in ("plain", "avx2", "avx512") if IS_NATIVE and usable(name)]


@contextmanager
def machine(name=None, threads=None):
    """The kernels of an instruction set, on a number of threads; afterwards everything is as before."""
    before = instruction_set(), torch.get_num_threads()
    try:
        if name is not None:
            set_instruction_set(name)
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        if name is not None:
            set_instruction_set(before[0])
        torch.set_num_threads(before[1])
