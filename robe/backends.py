"""The kernels: found, loaded, and named.

Importing this registers kernels over the reference bodies in robe/ops.py: the compiled ones for CPU tensors, where they
were built, and those in Triton for CUDA tensors, where triton is installed.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

_SWITCH = "ROBE_KERNELS"  # "native"; "reference" to leave all kernels out; or another build's file
_CUDA_SWITCH = "ROBE_CUDA_KERNELS"  # "triton"; "reference" to leave those for CUDA out
_ON_CUDA = [f"{what}{how}" for what in ("lookup", "bag") for how in ("", "_forward", "_out", "_backward")]
_ON_CUDA += ["bag_weights_backward", "update_"]
_library: ctypes.CDLL | None = None
_reason = ""
_cuda = ""


def backend() -> dict[str, str]:
    """Which kernels run, by device type, and where the compiled ones do not, why.

    Returns:
        {"cpu": ..., "cuda": ...}: "native (avx512)", with the instruction set in use, and "triton (3.6.0)", with its
        version; or "reference (the reason)", which is plain torch: right, but many times slower. Every other device
        runs the reference.
    """
    cpu = f"reference ({_reason})" if _library is None else f"native ({_library.robe_isa().decode()})"
    return {"cpu": cpu, "cuda": _cuda}


def set_instruction_set(name: str) -> None:
    """Use the CPU kernels of another instruction set: "plain", "avx2" or "avx512". For tests and measurements.

    Raises:
        ValueError: this machine lacks it, or the kernels are not loaded.
    """
    if _library is None or not _library.robe_set_isa(name.encode()):
        raise ValueError(f"instruction set: {name!r} is not to be had here; in use: {backend()['cpu']}")


def _load() -> None:
    global _library, _reason
    wanted = os.environ.get(_SWITCH, "native")
    if wanted == "reference":
        _reason = f"{_SWITCH}=reference"
        return
    folder = Path(__file__).parent
    files = [path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_cpu{suffix}").exists()]
    if wanted != "native":
        files = [Path(wanted)]
        if not files[0].is_file():
            raise ValueError(f"{_SWITCH}: expected native, reference or a library's file, got {wanted!r}")
    if not files:
        _reason = "the kernels were not built: install torch and a C++17 compiler, then install this package again"
        return
    try:
        library = ctypes.CDLL(str(files[0]))
    except OSError as error:
        _reason = f"{files[0].name} can't be loaded: {error}"
        return
    library.robe_isa.restype = ctypes.c_char_p
    library.robe_set_isa.argtypes, library.robe_set_isa.restype = [ctypes.c_char_p], ctypes.c_bool
    _library = library


def _register_triton() -> None:
    global _cuda
    for switch in (_SWITCH, _CUDA_SWITCH):
        if os.environ.get(switch) == "reference":
            _cuda = f"reference ({switch}=reference)"
            return
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:  # any folder of this name is found, too
        _cuda = "reference (triton is not installed)"
        return
    try:
        _cuda = f"triton ({importlib.metadata.version('triton')})"
    except importlib.metadata.PackageNotFoundError:  # builds for other machines have other names
        _cuda = "triton"
    for name in _ON_CUDA:
        torch.library.impl(f"robe::{name}", "CUDA", _on_first_call(name))


def _on_first_call(name: str):
    """A body from robe/triton_kernels.py, which is not imported before: that takes long, and most have no GPU."""

    def body(*arguments):
        from robe.triton_kernels import KERNELS

        return KERNELS[name](*arguments)

    return body


_load()
_register_triton()
