"""The JSON of benchmarks: results with the machine, versions, command and seed behind them."""

import os
from pathlib import Path
from typing import Any

import torch

import robe
from dlrm.machine import environment
from robe_files import write_json


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return the machine, versions, command, kernels in use and load."""
    values = environment() | {"kernels": robe.backend()[device], "load_average": os.getloadavg()[0]}
    return values | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def save(path: Path, results: Any, device: str = "cpu", seed: int = 0) -> None:
    """Write results as JSON.

    Args:
        path: of the file; its folder is created if needed.
        results: anything that JSON has.
        device: where they were measured, "cpu" or "cuda".
        seed: of ids, rows and weights.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"machine": machine(device), "seed": seed, "results": results})
