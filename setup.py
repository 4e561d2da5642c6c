"""Packaging. `pip install .` brings torch and numpy and gives `import robe`; the rest of the project is in extras.

The CPU kernels are compiled on the way, against the headers of the torch that is installed. Without a compiler or
without torch the package installs all the same, and robe runs on its reference in plain torch; robe.backend() tells.
"""

import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError


def torch_folder() -> Path:
    """Where torch is installed; a build that pip isolates does not see it on its path, but knows the environment."""
    for place in [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]:
        if (Path(place) / "torch" / "include").is_dir():
            return Path(place) / "torch"
    raise CompileError("torch is not installed here: install it first to have the CPU kernels")


class BuildKernels(build_ext):
    """Compiles the kernels against torch's headers. They are optional: what fails is a warning."""

    def build_extension(self, extension: Extension) -> None:
        torch = torch_folder()
        extension.include_dirs, extension.library_dirs = [str(torch / "include")], [str(torch / "lib")]
        super().build_extension(extension)


setup(
    ext_modules=[
        Extension(
            "robe._cpu",
            ["robe/csrc/robe_cpu.cpp"],
            depends=[f"robe/csrc/{name}.h" for name in ("job", "kernels", "interaction", "mlp", "admission")],
            # No product is fused with a sum: every instruction set then gives the same bits.
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-g0",
            ],
            libraries=["torch_cpu"],
            language="c++",
            py_limited_api=True,  # the library holds no Python at all
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
