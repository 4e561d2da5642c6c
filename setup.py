"""Builds the compiled libraries. The metadata of the package is in pyproject.toml.

The libraries are plain shared ones. They hold no Python and need no torch to build, so one wheel serves every Python
and every torch from 2.10 on. Without a C++17 compiler the package installs all the same, says so in one line, and robe
runs on its reference in plain torch. ROBE_REQUIRE_KERNELS=1 makes that an error.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError
from setuptools.modified import newer_group

REQUIRED = "ROBE_REQUIRE_KERNELS"
FLAGS = ["-std=c++17", "-O3", "-g0"]
# No product is fused with a sum: every instruction set then gives the same bits.
KERNEL_FLAGS = [*FLAGS, "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]


def library(name: str, source: str, headers: list[str], flags: list[str]) -> Extension:
    """Describe a library of one source file.

    Args:
        name: its module path: robe._cpu is built as robe/_cpu.so.
        source: the file that is compiled.
        headers: the folders of what it includes.
        flags: for the compiler.
    """
    depends = [str(path) for folder in headers for path in sorted(Path(folder).glob("*.h"))]
    return Extension(name, [source], include_dirs=headers, depends=depends, extra_compile_args=flags, language="c++")


KERNELS = [
    library("robe._cpu", "robe/csrc/robe_cpu.cpp", ["robe/csrc"], KERNEL_FLAGS),
    library("dlrm._cpu", "dlrm/csrc/dlrm_cpu.cpp", ["dlrm/csrc", "robe/csrc"], KERNEL_FLAGS),
]
READER = library("data._tsv", "data/csrc/criteo_tsv.cpp", [], FLAGS)  # of the checkout, not in the wheel


class BuildLibraries(build_ext):
    """Compiles the libraries, several at a time. What fails is left out."""

    def finalize_options(self) -> None:
        """Take all cores, and leave the reader of logs out of wheels."""
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()
        self.in_checkout = bool(self.inplace)  # editable, too
        if not self.in_checkout:
            self.extensions = [extension for extension in self.extensions if extension is not READER]
        self.failed: list[str] = []

    def get_ext_filename(self, fullname: str) -> str:
        """Return the library's path, without the suffix that ties it to one Python."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extensions(self) -> None:
        """Build all libraries, and say which could not be built."""
        try:
            stub = self.stub_of_torch()
        except CCompilerError:  # there is no compiler, or it does not work
            self.failed = [extension.name for extension in self.extensions]
        else:
            for kernels in KERNELS:
                kernels.extra_link_args = ["-Wl,--no-as-needed", stub]
            super().build_extensions()
        for extension in self.extensions:
            extension.optional = True  # the absence is told here
        if self.failed:
            self.tell_failure()

    def stub_of_torch(self) -> str:
        """Build an empty library with the name of torch's, to link with: when robe is imported, torch's is loaded."""
        folder = Path(self.build_temp, "stub")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "empty.cpp").write_text("")
        objects = self.compiler.compile([str(folder / "empty.cpp")], output_dir=str(folder))
        stub = folder / "libtorch_cpu.so"
        name = f"-Wl,-soname,{stub.name}"
        self.compiler.link_shared_object(objects, str(stub), extra_postargs=[name], target_lang="c++")
        return str(stub)

    def build_extension(self, extension: Extension) -> None:
        """Build a library, or copy the one in the checkout if it is up to date."""
        built, target = Path(self.get_ext_filename(extension.name)), Path(self.get_ext_fullpath(extension.name))
        parts = [*extension.sources, *extension.depends, __file__]
        if self.in_checkout and not self.force and not newer_group(parts, str(built)):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(built, target)
            return
        try:
            super().build_extension(extension)
        except CCompilerError:
            self.failed.append(extension.name)

    def tell_failure(self) -> None:
        """Say in one line what is missing and why.

        Raises:
            CompileError: ROBE_REQUIRE_KERNELS is set.
        """
        compiler = self.compiler.compiler_so_cxx[0]
        reason = (
            f"{compiler} failed" if shutil.which(compiler) else f"there is no C++ compiler ({compiler} was not found)"
        )
        line = f"robe-dlrm: built without {', '.join(sorted(self.failed))}: {reason}"
        if os.environ.get(REQUIRED, "0") != "0":
            raise CompileError(f"{line}, and {REQUIRED} is set")
        line += ". Slow Python runs instead. Install a C++17 compiler, then install again (uv: with --reinstall)"
        print(line, file=sys.stderr)
        show(line)


def show(line: str) -> None:
    """Print a line on the standard error of pip or uv, which started this process: they hide what a build prints."""
    try:
        stream = os.open(f"/proc/{os.getppid()}/fd/2", os.O_WRONLY | os.O_APPEND)
    except OSError:  # not Linux, or a stream that can't be opened
        return
    try:
        os.write(stream, f"{line}\n".encode())
    finally:
        os.close(stream)


class PlatformWheel(bdist_wheel):
    """Tags the wheel: any Python 3, this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag: the libraries hold no Python."""
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=[*KERNELS, READER], cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel})
