"""Prints what a bug report needs when it is run: python -m robe."""

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

import torch

import robe

_CPUINFO = Path("/proc/cpuinfo")
_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
# What the CPU kernels of avx2 and avx512 are compiled for.
_EXTENSIONS = ("avx2", "bmi1", "bmi2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl")
_GIB = 2**30


def main() -> None:
    """Print lines "name: value"."""
    for name, value in report().items():
        print(f"{name}: {value}")


def report() -> dict[str, str]:
    """Describe this installation and this machine.

    Returns:
        versions, kernels, CPU, GPU, threads, memory and switches, in the order in which they are printed.
    """
    kernels = {f"kernels on {device}": name for device, name in robe.backend().items()}
    switches = [
        f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(("ROBE_", "TRITON_"))
    ]
    return {
        "robe": f"{robe.__version__} ({Path(robe.__file__).parent})",
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "torch": torch.__version__,
        "numpy": _version("numpy"),
        "safetensors": _version("safetensors"),
        "triton": _version("triton"),
        **kernels,
        "CPU": _cpu(),
        "instruction sets": _instruction_sets(),
        "GPU": _gpu(),
        "threads": f"{torch.get_num_threads()} of torch, {_cores()} cores",
        "OS": platform.platform(),
        "memory": _memory(),
        "environment": ", ".join(switches) or "no ROBE_* or TRITON_* variable is set",
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        found = importlib.util.find_spec(package)
        return "not installed" if found is None or found.origin is None else "unknown"


def _of_cpu(name: str) -> str:
    """The value of the first core's line in /proc/cpuinfo; "" where there is none."""
    if not _CPUINFO.is_file():
        return ""
    for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _cpu() -> str:
    return f"{_of_cpu('model name') or platform.processor() or 'unknown'} ({platform.machine()})"


def _instruction_sets() -> str:
    """The extensions that the kernels ask about; the set in use is in the line of the kernels."""
    flags = _of_cpu("flags").split()
    if not flags:
        return f"unknown; torch uses {torch.backends.cpu.get_cpu_capability()}"
    there, missing = ([name for name in _EXTENSIONS if (name in flags) == wanted] for wanted in (True, False))
    return " ".join(there or ["none"]) + (f"; missing: {' '.join(missing)}" if missing else "")


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    try:
        total = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / _GIB:.1f} GiB"
    except (AttributeError, OSError, ValueError):
        total = "unknown"
    limit = _MEMORY_LIMIT.read_text().strip() if _MEMORY_LIMIT.is_file() else "max"
    return total + (f", limited to {int(limit) / _GIB:.1f} GiB by the control group" if limit.isdigit() else "")


if __name__ == "__main__":
    main()
