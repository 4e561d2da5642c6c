"""The model's own operators: registered, served by the compiled kernels, and free of leaks.

What they compute is in test_interaction.py and test_mlp.py.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dlrm import ops
from dlrm.ops import pack_linear
from tests.helpers.kernels import IS_NATIVE, needs_kernels
from tests.helpers.memory import STATM, growth

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ops.REFERENCE)
def test_the_kernels_run_where_they_are_built(name):
    assert ("\nCPU: registered" in torch._C._dispatch_dump(f"dlrm::{name}")) == IS_NATIVE


def test_robe_alone_does_not_register_them():
    code = "import robe, torch; print(hasattr(torch.ops.dlrm, 'mlp'))"
    got = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert got.stdout.strip() == "False"


@needs_kernels
@pytest.mark.skipif(not STATM.exists(), reason="reads the memory in use from /proc, which only Linux has")
def test_nothing_leaks():
    """Each tensor that a call takes over is 1 MB or more; leaked once in a hundred calls, it would be seen."""
    dense, embeddings = torch.ones(2000, 16), torch.ones(2000, 8, 16)
    grad = torch.ones(2000, 16 + 36)
    weight = torch.ones(8000, 32)
    for call in (
        lambda: torch.ops.dlrm.mlp(torch.ones(4, 32), *([x] for x in pack_linear(weight, None)), 8000, True),
        lambda: torch.ops.dlrm.mlp(torch.ones(4, 32), *([x] for x in pack_linear(weight, None, 16)), 8000, True),
        lambda: torch.ops.dlrm.dot_interaction(dense.clone(), embeddings.clone()),
        lambda: torch.ops.dlrm.dot_interaction_backward(grad.clone(), dense.clone(), embeddings.clone()),
    ):
        assert growth(call, 10, 100) < 20_000_000
