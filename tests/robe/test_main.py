"""python -m robe: what a bug report needs."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import robe
from robe import __main__ as program

ROOT = Path(__file__).parents[2]
NAMES = [
    "robe",
    "python",
    "torch",
    "numpy",
    "safetensors",
    "triton",
    "kernels on cpu",
    "kernels on cuda",
    "CPU",
    "instruction sets",
    "GPU",
    "threads",
    "OS",
    "memory",
    "environment",
]


def printed(**variables):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [sys.executable, "-m", "robe"], env=environment, capture_output=True, text=True, check=True
    ).stdout


def values(text):
    lines = [re.fullmatch(r"([^:]+): (\S.*)", line) for line in text.splitlines()]
    assert all(lines), text
    return {line[1]: line[2] for line in lines}


def test_a_line_for_each_name():
    told = values(printed(OMP_NUM_THREADS="1"))
    assert list(told) == NAMES
    assert told["robe"].startswith(f"{robe.__version__} (")
    assert told["python"].startswith(platform.python_version())
    assert told["torch"] == torch.__version__
    assert told["kernels on cpu"] == robe.backend()["cpu"]
    assert told["kernels on cuda"] == robe.backend()["cuda"]
    assert told["threads"].startswith("1 of torch, ")


def test_says_why_kernels_are_not_used():
    told = values(printed(ROBE_KERNELS="reference"))
    assert told["kernels on cpu"] == told["kernels on cuda"] == "reference (ROBE_KERNELS=reference)"
    assert "ROBE_KERNELS=reference" in told["environment"].split(", ")


def test_imports_nothing_of_this_project_but_robe():
    command = "import sys, robe.__main__; print(*{name.partition('.')[0] for name in sys.modules})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True
    )
    assert {"robe", "dlrm", "data"} & set(result.stdout.split()) == {"robe"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("avx2 bmi1 bmi2 fma f16c sse", "avx2 bmi1 bmi2 fma f16c; missing: avx512f avx512bw avx512dq avx512vl"),
        ("avx512f avx512bw avx512dq avx512vl avx2 bmi1 bmi2 fma f16c", " ".join(program._EXTENSIONS)),
        ("sse", "none; missing: " + " ".join(program._EXTENSIONS)),
    ],
)
def test_instruction_sets(flags, expected, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    monkeypatch.setattr(program, "_CPUINFO", tmp_path / "cpuinfo")
    assert program.report()["instruction sets"] == expected
    assert program.report()["CPU"] == f"Some CPU ({platform.machine()})"


def test_machines_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(program, "_CPUINFO", tmp_path / "none")
    monkeypatch.setattr(program, "_MEMORY_LIMIT", tmp_path / "none")
    told = program.report()
    assert told["instruction sets"].startswith("unknown; torch uses ")
    assert re.fullmatch(r"\d+\.\d GiB", told["memory"])


@pytest.mark.parametrize(
    ("limit", "expected"), [("max\n", ""), (f"{3 * 2**29}\n", ", limited to 1.5 GiB by the control group")]
)
def test_memory_limit(limit, expected, monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(program, "_MEMORY_LIMIT", tmp_path / "memory.max")
    assert re.fullmatch(r"\d+\.\d GiB" + re.escape(expected), program.report()["memory"])
