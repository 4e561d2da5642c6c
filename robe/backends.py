"""The kernel backends: found, loaded, registered over the reference bodies, and described.

BACKENDS lists them all. Compiled kernels for CPU tensors lie in a library ``_cpu.so`` beside each package that has some
(robe, dlrm); kernels in Triton for CUDA tensors in robe/triton_kernels. A new backend is an entry in BACKENDS and the
module with its kernels.

Environment variables: ROBE_KERNELS is "native" (the default), "reference" to leave all kernels out, or a folder with
another build, robe/_cpu.so and dlrm/_cpu.so. ROBE_CUDA_KERNELS=reference leaves out those for CUDA.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

LIBRARY = "_cpu.so"
INSTRUCTION_SETS = ("plain", "avx2", "avx512")
_SWITCH = "ROBE_KERNELS"
_CUDA_SWITCH = "ROBE_CUDA_KERNELS"
_ON_CUDA = [f"{operator}{form}" for operator in ("lookup", "bag") for form in ("", "_forward", "_out", "_backward")]
_ON_CUDA += ["bag_weights_backward", "update_"]


class KernelsMissing(RuntimeWarning):
    """Warns that the compiled kernels were not built, so that the reference runs, many times slower."""


class Backend(NamedTuple):
    """A set of kernels for one type of device.

    Attributes:
        device: its type in torch.
        register: registers the kernels, called once at import; returns why there are none, or "".
        describe: names the kernels in use, once they are registered.
    """

    device: str
    register: Callable[[], str]
    describe: Callable[[], str]


_libraries: list[ctypes.CDLL] = []  # robe's first
_reasons: dict[str, str] = {}  # by device: why its kernels are absent


def backend() -> dict[str, str]:
    """Name the kernels that run, by device type.

    Returns:
        {"cpu": ..., "cuda": ...}: "native (avx512)", with the instruction set in use, and "triton (3.6.0)", with its
        version; or "reference (the reason)", which is plain torch: right, but many times slower. Every other device
        runs the reference.
    """
    return {b.device: f"reference ({_reasons[b.device]})" if _reasons[b.device] else b.describe() for b in BACKENDS}


def set_instruction_set(name: str) -> None:
    """Use the CPU kernels of another instruction set: "plain", "avx2" or "avx512". For tests and measurements.

    Raises:
        ValueError: this CPU lacks it, or the kernels are not loaded.
    """
    if not _libraries or not all(library.robe_set_isa(name.encode()) for library in _libraries):
        raise ValueError(f"instruction set: {name!r} is not available here; in use: {backend()['cpu']}")


def load_library(package: Path) -> str:
    """Load the compiled kernels of a package; loading registers them.

    Args:
        package: its folder.

    Returns:
        why there are none; "" if they were loaded.

    Raises:
        ValueError: ROBE_KERNELS names no folder with this library.
    """
    wanted = os.environ.get(_SWITCH, "native")
    if wanted == "reference":
        return f"{_SWITCH}=reference"
    file = package / LIBRARY if wanted == "native" else Path(wanted) / package.name / LIBRARY
    if not file.is_file():
        if wanted != "native":
            raise ValueError(
                f"{_SWITCH}: expected native, reference or a folder with {package.name}/{LIBRARY}, got {wanted!r}"
            )
        reason = "the kernels were not built: install a C++17 compiler, then install this package again"
        # One text from one place: Python shows it once, whatever number of libraries is missing.
        missing = KernelsMissing(f"{reason}. Until then the reference in plain torch runs, many times slower")
        warnings.warn(missing, stacklevel=1)
        return reason
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        return f"{file.name} can't be loaded: {error}"
    library.robe_isa.restype = ctypes.c_char_p
    library.robe_set_isa.argtypes, library.robe_set_isa.restype = [ctypes.c_char_p], ctypes.c_bool
    if hasattr(library, "robe_connect") and _libraries:  # it reads embeddings as robe's own operators do
        library.robe_connect(ctypes.cast(_libraries[0].robe_read, ctypes.c_void_p))
    _libraries.append(library)
    return ""


def _register_native() -> str:
    return load_library(Path(__file__).parent)


def _describe_native() -> str:
    return f"native ({_libraries[0].robe_isa().decode()})"


def _register_triton() -> str:
    for switch in (_SWITCH, _CUDA_SWITCH):
        if os.environ.get(switch) == "reference":
            return f"{switch}=reference"
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:  # any folder of this name is found, too
        return "triton is not installed"
    for name in _ON_CUDA:
        torch.library.impl(f"robe::{name}", "CUDA", _on_first_call(name))
    return ""


def _describe_triton() -> str:
    try:
        return f"triton ({importlib.metadata.version('triton')})"
    except importlib.metadata.PackageNotFoundError:  # builds for other machines have other names
        return "triton"


def _on_first_call(name: str) -> Callable[..., Any]:
    """A body that imports robe.triton_kernels when it is called: importing takes long, and most have no GPU."""

    def body(*arguments: Any) -> Any:
        from robe.triton_kernels import KERNELS

        return KERNELS[name](*arguments)

    return body


BACKENDS = (
    Backend("cpu", _register_native, _describe_native),
    Backend("cuda", _register_triton, _describe_triton),
)
for _backend in BACKENDS:
    _reasons[_backend.device] = _backend.register()
