"""A plugin of pytest, ``-p interpreted``: the kernels in Triton compute on CPU tensors too, in Triton's interpreter.

With TRITON_INTERPRET=1, and ROBE_KERNELS=reference, so that no other kernels are there.
"""

import pytest
import torch

import robe
from robe.triton_kernels import KERNELS

assert robe.backend()["cpu"] == "reference (ROBE_KERNELS=reference)", robe.backend()
for _name, _body in KERNELS.items():
    torch.library.impl(f"robe::{_name}", "CPU", _body)


def pytest_configure(config):
    # The interpreter computes in numpy, which would tell of hashes that overflow and of infinities.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton")


def pytest_collection_modifyitems(items):
    for item in items:
        if mark := item.get_closest_marker("cpu_only"):
            (reason,) = mark.args
            item.add_marker(pytest.mark.skip(reason=reason))
