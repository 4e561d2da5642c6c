"""The kernels in Triton, compiled for GPUs down to machine code, which takes none. Nothing runs here."""

import os
import re
from collections import Counter

import pytest
import torch

from tests.helpers.problems import RULES, Problem, updated

pytest.importorskip("triton", reason="needs triton: make test-triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler, not its interpreter: make test-triton", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

from robe.triton_kernels import KERNELS

POOLINGS = ("sum", "mean", "max", "weighted")
FORWARD = {"_lookup_kernel", "_bag_kernel"}
LISTS = {"_list_lookup_kernel", "_list_bags_kernel", "_list_largest_kernel"}
READ_IDS = FORWARD | LISTS | {"_lookup_backward_kernel", "_bag_backward_kernel", "_bag_weights_backward_kernel"}
SUMS = {"_sum_runs_kernel", "_move_pieces_kernel", "_sum_pieces_kernel", "_update_kernel"}


class Driver:
    """As much of a GPU as the compiler asks for."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, device):
        return 0


@pytest.fixture(params=[80, 90, 100], ids=lambda capability: f"sm_{capability}")
def compiled(request, monkeypatch):
    """The kernels that launches have compiled: a list of (name, memory instructions)."""
    kernels, launch = [], JITFunction.run

    def compile(kernel, *arguments, **options):
        result = launch(kernel, *arguments, **options | {"warmup": True})
        assert result.asm["cubin"]
        assert ("__assertfail" in result.asm["ptx"]) == (kernel.__name__ in READ_IDS)
        accesses = re.findall(r"\b(ld|st|red|atom)\.global([\w.:]*)", result.asm["ptx"])
        kernels.append((kernel.__name__, Counter(kind + size for kind, size in accesses)))
        return result

    monkeypatch.setattr(JITFunction, "run", compile)
    triton.runtime.driver.set_active(Driver(request.param))
    return kernels


def run_everything(problem):
    arguments = problem.lookup(40)
    grad = problem.grad(40)
    KERNELS["lookup"](*arguments, problem.scale, problem.filter)
    bags = [problem.bag(40, name.replace("weighted", "sum"), weighted=name == "weighted") for name in POOLINGS]
    for bag in bags:
        KERNELS["bag"](*bag, problem.scale, problem.filter)
    if problem.dtype == torch.int8:
        return
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            KERNELS["lookup_backward"](grad, *arguments, problem.filter)
            for bag in bags:
                KERNELS["bag_backward"](grad, *bag, problem.filter)
        finally:
            torch.use_deterministic_algorithms(False)
    KERNELS["bag_weights_backward"](grad, *bags[-1], problem.filter)
    for rule, options in RULES.items():
        calls = [(grad, arguments[1:], problem.filter), (grad, bags[0][1:], problem.filter)]
        updated(KERNELS["update_"], problem.weight, rule, options, calls)


@pytest.mark.parametrize(
    "options",
    [
        {"dim": 128, "block": 32, "words": 9, "padding_idx": 3},
        {"dim": 13, "block": 5, "sign": True, "dtype": torch.bfloat16},
        {"dim": 5, "block": 12, "sign": True, "wide": False},
        {"dim": 24, "block": 8, "hash": "linear", "sign": True, "dtype": torch.float16},
        {"dim": 1, "block": 1, "hash": "identity", "dtype": torch.float64},
        {"dim": 16, "block": 16, "dtype": torch.int8},
        {"dim": 3000, "block": 1500},
    ],
    ids=str,
)
def test_every_kernel_compiles(compiled, options):
    run_everything(Problem([1, 7], size=5000, **options))
    names = {name for name, _ in compiled}
    if options.get("dtype") == torch.int8:
        assert names == FORWARD
    elif options.get("dtype") == torch.float64:
        assert names == (READ_IDS | SUMS) - {"_update_kernel"}
    else:
        assert names == READ_IDS | SUMS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [8, 16, 64, 128])
def test_embeddings_are_written_16_bytes_at_a_time(compiled, dim, dtype):
    problem = Problem([40, 7], size=5000, dim=dim, block=dim, dtype=dtype)
    KERNELS["lookup"](*problem.lookup(4))
    KERNELS["bag"](*problem.bag(4, "sum"))
    for _, accesses in compiled:
        assert {access for access in accesses if access.startswith("st")} == {"st.v4.b32"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_aligned_is_read_16_bytes_at_a_time(compiled, dtype):
    """Rows that have slots of their own, and gradients."""
    problem = Problem([40, 7], size=5000, dim=64, hash="identity", dtype=dtype)
    KERNELS["lookup"](*problem.lookup(4))
    KERNELS["bag_backward"](problem.grad(4), *problem.bag(4, "sum"))
    for _, accesses in compiled:
        assert "ld.v4.b32" in accesses
        assert not [access for access in accesses if access.endswith(".b16")]
