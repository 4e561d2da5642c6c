"""The compiled kernels: found, loaded, and named.

Importing this registers the CPU kernels over the reference bodies in robe/ops.py, where they were built.
"""

import ctypes
import os
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

_SWITCH = "ROBE_KERNELS"  # "native"; "reference" to leave the compiled kernels out; or another build's file
_library: ctypes.CDLL | None = None
_reason = ""


def backend() -> dict[str, str]:
    """Which kernels run, by device type, and where the compiled ones do not, why.

    Returns:
        {"cpu": ...}: "native (avx512)", with the instruction set in use, or "reference (the reason)", which is plain
        torch: right, but many times slower. Every other device runs the reference.
    """
    if _library is None:
        return {"cpu": f"reference ({_reason})"}
    return {"cpu": f"native ({_library.robe_isa().decode()})"}


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


_load()
