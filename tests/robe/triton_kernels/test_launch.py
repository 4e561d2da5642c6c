"""What is checked before any launch: shapes, types and devices; and which tensors get these kernels."""

import os
import subprocess
import sys

import pytest
import torch

from tests.helpers.problems import Problem
from tests.helpers.triton_bodies import KERNELS

# isort: split
import triton


def test_cuda_tensors_get_these_kernels():
    code = (
        "import sys, torch, robe; has = torch._C._dispatch_has_kernel_for_dispatch_key; "
        f"print(robe.backend()['cuda'], {{has('robe::' + name, 'CUDA') for name in {list(KERNELS)}}}); "
        "assert 'triton' not in sys.modules"
    )

    def told(**environment):
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=os.environ | environment, text=True, check=True, capture_output=True).stdout

    assert told(ROBE_KERNELS="native") == f"triton ({triton.__version__}) {{True}}\n"
    assert told(ROBE_KERNELS="reference") == "reference (ROBE_KERNELS=reference) {False}\n"


def test_shapes_and_types_are_refused():
    problem = Problem([50])
    weight, ids, *tables = problem.lookup(4)
    with pytest.raises(ValueError, match=r"ids: expected \(B, 1\), one column per feature, got \(4, 2\)"):
        KERNELS["lookup"](weight, torch.cat([ids, ids], 1), *tables)
    with pytest.raises(ValueError, match=r"out: expected torch.float32 \(4, 1, 8\), got torch.float64 \(4, 1, 8\)"):
        KERNELS["lookup_out"](weight, ids, *tables, None, torch.empty(4, 1, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="ids: expected on cpu, where the weights are, got meta"):
        KERNELS["lookup"](weight, ids.to("meta"), *tables)
    with pytest.raises(ValueError, match="scale: expected with an int8 weight"):
        KERNELS["lookup"](weight, ids, *tables, torch.ones(1))
