"""Which kernels are loaded and run, and why not others."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import robe
from robe.backends import LIBRARY, KernelsMissing, load_library, set_instruction_set
from tests.helpers.kernels import BACKEND, IS_NATIVE, SETS, instruction_set, machine, needs_kernels

ROOT = Path(__file__).parents[2]


# ---------------------------------------------------------------------------------------------------------------------
# Which kernels run


def test_backend_names_the_kernels():
    assert list(robe.backend()) == ["cpu", "cuda"]
    assert IS_NATIVE or BACKEND.startswith("reference (")
    assert (instruction_set() in ("plain", "avx2", "avx512")) == IS_NATIVE


@needs_kernels
@pytest.mark.parametrize("name", SETS)
def test_an_instruction_set_can_be_chosen(name):
    with machine(name):
        assert robe.backend()["cpu"] == f"native ({name})"


@pytest.mark.parametrize(
    ("file", "switch", "want"),
    [
        ("notes.txt", "triton", "reference (triton is not installed)"),  # any folder of this name can be imported
        ("__init__.py", "triton", "triton"),  # builds for some machines are distributed under other names
        ("__init__.py", "reference", "reference (ROBE_CUDA_KERNELS=reference)"),
    ],
)
def test_triton_is_found_where_it_is(file, switch, want, tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / file).touch()
    code = "import robe; print(robe.backend()['cuda'])"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "ROBE_CUDA_KERNELS": switch}
    got = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True, check=True)
    assert got.stdout.strip() == want


@pytest.mark.parametrize("name", ["", "avx", "AVX2", "plain "])
def test_an_unknown_instruction_set_is_refused_and_changes_nothing(name):
    before = robe.backend()
    with pytest.raises(ValueError, match=f"instruction set: '{name}' is not available here; in use: "):
        set_instruction_set(name)
    assert robe.backend() == before


# ---------------------------------------------------------------------------------------------------------------------
# Which library is loaded: each in a process of its own

PROGRAM = """
import warnings
warnings.simplefilter("error")
import robe, torch
layer = robe.RobeEmbedding(10, 4, robe_size=30)
layer(torch.tensor([1, 2])).sum().backward()
assert layer.array.weight.grad.any()
robe.optim.Adagrad(layer)
print(robe.backend()["cpu"])
"""


def run_with(kernels, program=PROGRAM):
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"ROBE_KERNELS": str(kernels)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_reference_can_be_asked_for_and_works():
    choose = "\ntry:\n    robe.backends.set_instruction_set('plain')\nexcept ValueError as error:\n    print(error)"
    result = run_with("reference", PROGRAM + choose)
    assert result.stderr == ""
    backend = "reference (ROBE_KERNELS=reference)"
    assert result.stdout.splitlines() == [
        backend,
        f"instruction set: 'plain' is not available here; in use: {backend}",
    ]


def test_a_library_that_is_not_there_is_refused():
    result = run_with("/nonexistent")
    assert result.returncode != 0
    message = "ValueError: ROBE_KERNELS: expected native, reference or a folder with robe/_cpu.so, got '/nonexistent'"
    assert result.stderr.splitlines()[-1] == message


def test_a_library_that_cannot_be_loaded_leaves_the_reference_and_the_reason(tmp_path):
    (tmp_path / "robe").mkdir()
    (tmp_path / "robe" / "_cpu.so").write_bytes(b"no library at all")
    result = run_with(tmp_path)
    assert result.stderr == ""
    assert result.stdout.startswith("reference (_cpu.so can't be loaded: ")


@needs_kernels
def test_a_library_may_be_given_by_its_folder(tmp_path):
    (tmp_path / "robe").mkdir()
    shutil.copy(Path(robe.__file__).with_name(LIBRARY), tmp_path / "robe")
    result = run_with(tmp_path)
    assert result.stderr == ""
    assert result.stdout.startswith("native (")


def test_missing_kernels_are_warned_of_once_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.delenv("ROBE_KERNELS", raising=False)
    before = robe.backend()
    with pytest.warns(
        KernelsMissing, match="were not built: install a C.* compiler, then install this .* slower"
    ) as told:
        reason = load_library(tmp_path)
    assert reason == "the kernels were not built: install a C++17 compiler, then install this package again"
    assert len(told) == 1
    assert robe.backend() == before


def test_importing_robe_without_kernels_warns_once(tmp_path):
    for package in ("robe", "dlrm"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = "import robe, dlrm; print(robe.backend()['cpu'])"
    environment = {name: value for name, value in os.environ.items() if name != "ROBE_KERNELS"}
    got = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True, capture_output=True, check=True
    )
    assert got.stdout.startswith("reference (the kernels were not built: ")
    assert got.stderr.count("KernelsMissing") == 1


@needs_kernels
def test_the_instruction_sets_of_all_libraries_are_switched_together():
    import dlrm.ops  # noqa: F401  (loads the second library)

    files = [ROOT / package / LIBRARY for package in ("robe", "dlrm")]
    libraries = [ctypes.CDLL(str(file)) for file in files]  # those in use: a file is loaded once
    for library in libraries:
        library.robe_isa.restype = ctypes.c_char_p
    for name in SETS:
        with machine(name):
            assert [library.robe_isa().decode() for library in libraries] == [name, name]
