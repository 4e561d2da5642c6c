"""The facts that stand beside every result."""

import json

import torch

import robe
from benchmarks.results import machine, save


def test_results_carry_machine_versions_command_and_seed(tmp_path):
    save(tmp_path / "new" / "x.json", [1, 2], seed=7)
    saved = json.loads((tmp_path / "new" / "x.json").read_text())
    assert saved["results"] == [1, 2]
    assert saved["seed"] == 7
    assert saved["machine"]["torch"] == torch.__version__
    assert saved["machine"]["kernels"] == robe.backend()["cpu"]
    assert {"command", "machine", "python", "numpy", "cpu_capability", "load_average"} <= set(machine())
