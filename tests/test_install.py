"""The project installed into clean environments: by pip, by uv and from the wheel, with and without a compiler.

An environment sees the packages of the one that runs the tests, so torch is not downloaded again, but not this project.
`make test-install` runs these tests: it builds the wheel first.
"""

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import robe

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
UV = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
LOOKUP = """
import robe, torch
layer = robe.RobeEmbedding(100, 8, robe_size=64)
ids = torch.tensor([0, 99, 7])
assert torch.equal(layer(ids), layer.full_weight()[ids])
print(robe.__file__)
print(robe.backend()["cpu"])
"""
MISSING = "robe-dlrm: built without dlrm._cpu, robe._cpu: there is no C++ compiler ("

pytestmark = pytest.mark.install
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")


class Environment:
    """A virtual environment, and the variables with which commands run in it."""

    def __init__(self, folder, compiler):
        """Make it.

        Args:
            folder: where; other files of the test may lie there, too.
            compiler: the C++ compiler in it; None: no program but Python and those of the environment is found.
        """
        self.folder, self.elsewhere = folder / "environment", folder / "elsewhere"
        self.elsewhere.mkdir()
        venv.create(self.folder, symlinks=True)
        self.python = self.folder / "bin" / "python"
        self.site = Path(sysconfig.get_path("purelib", "venv", {"base": str(self.folder)}))
        # A path, never links: what an installer replaces in this environment must not be the packages themselves.
        (self.site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
        dropped = ("ROBE_", "PYTHON", "CC", "CXX", "VIRTUAL_ENV", "UV_PYTHON")
        self.variables = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        self.variables |= {
            "PATH": str(self.python.parent),
            "UV_CACHE_DIR": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        if compiler is not None:
            self.variables |= {"PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}", "CXX": str(compiler)}

    def run(self, *command, folder=None, **variables):
        """Run a command, in an empty folder if none is given; its output and errors are in one text."""
        return subprocess.run(
            [str(word) for word in command],
            cwd=folder or self.elsewhere,
            env=self.variables | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def install(self, *arguments, **options):
        """Install by pip, or by uv if that is the first argument; return the output."""
        words = [self.python, "-m", "pip", "install", "--no-deps", "--ignore-installed"]  # it removes nothing
        if arguments[0] == "uv":
            words, arguments = [UV, "pip", "install", "--no-deps", "--python", self.python], arguments[1:]
        result = self.run(*words, *arguments, **options)
        assert result.returncode == 0, result.stdout
        return result.stdout

    def look_up(self):
        """Look ids up in the installed package; return the name of the kernels and what was printed besides."""
        result = self.run(self.python, "-c", LOOKUP)
        assert result.returncode == 0, result.stdout
        *told, file, backend = result.stdout.splitlines()
        assert Path(file) == self.site / "robe" / "__init__.py"
        return backend, told


@pytest.fixture
def quick_compiler(tmp_path):
    """The compiler without optimization, which takes a tenth of the time."""
    script = tmp_path / "quick-c++"
    script.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" -O0\n')
    script.chmod(0o755)
    return script


@pytest.fixture
def environment(tmp_path, quick_compiler):
    return Environment(tmp_path, quick_compiler)


@pytest.fixture
def without_compiler(tmp_path):
    return Environment(tmp_path, None)


@pytest.fixture
def sources(tmp_path):
    """A copy of the checkout, without what was built in it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            target = tmp_path / "sources" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    return tmp_path / "sources"


@pytest.fixture
def wheel():
    wheels = list((ROOT / "dist").glob("*.whl"))
    assert len(wheels) == 1, "run `make wheel` first"
    return wheels[0]


# ---------------------------------------------------------------------------------------------------------------------
# With a compiler


@needs_compiler
@pytest.mark.parametrize("command", ["pip install .", "pip install --no-build-isolation .", "uv pip install ."])
def test_installing_builds_the_kernels(command, environment, sources):
    if command.startswith("uv") and UV is None:
        pytest.fail("uv is missing: make setup installs it")
    words = command.replace("pip install ", "").split()
    assert "built without" not in environment.install(*words, folder=sources)
    backend, told = environment.look_up()
    assert backend.startswith("native (")
    assert told == []
    assert not (environment.site / "data").exists()


@needs_compiler
def test_source_distribution(environment, sources, tmp_path):
    build = "from setuptools import build_meta; build_meta.build_sdist('made')"
    result = environment.run(environment.python, "-c", build, folder=sources)
    assert result.returncode == 0, result.stdout
    (archive,) = (sources / "made").iterdir()
    assert archive.name == f"robe_dlrm-{robe.__version__}.tar.gz"
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {"LICENSE", "README.md", "CITATION.cff", "pyproject.toml", "setup.py", "robe/py.typed"} <= names
    assert {str(path.relative_to(ROOT)) for path in ROOT.glob("*/csrc/*")} <= names
    environment.install("--no-build-isolation", archive)
    assert environment.look_up()[0].startswith("native (")


def test_setup_installs_the_checkout(tmp_path):
    """`import robe` works from any folder with the Python of .venv."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    code = "import importlib.metadata as m, robe; print(robe.__file__); print(m.version('robe-dlrm'))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == [str(ROOT / "robe" / "__init__.py"), robe.__version__]


# ---------------------------------------------------------------------------------------------------------------------
# Without a compiler


def test_wheel_needs_no_compiler(wheel, without_compiler):
    without_compiler.install(wheel)
    backend, told = without_compiler.look_up()
    assert backend.startswith("native (")
    assert told == []


def test_wheel_imports_with_the_dependencies_alone(wheel, without_compiler):
    without_compiler.install(wheel)
    extras = ["polars", "isal", "sklearn", "tqdm", "matplotlib", "tensorboard", "mlperf_logging", "huggingface_hub"]
    extras += ["onnx", "onnxruntime", "mlperf_loadgen", "triton", "data"]
    code = f"import sys; sys.modules |= dict.fromkeys({extras}); import robe, dlrm; print(dlrm.__file__)"
    result = without_compiler.run(without_compiler.python, "-c", code)
    assert result.stdout.strip() == str(without_compiler.site / "dlrm" / "__init__.py")


@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_installing_says_that_the_compiler_is_missing(tool, without_compiler, sources):
    words = ["uv", "."] if tool == "uv" else ["--no-build-isolation", "."]
    lines = without_compiler.install(*words, folder=sources).splitlines()
    (line,) = [line for line in lines if line.startswith("robe-dlrm: ")]
    assert line.startswith(MISSING)
    assert "Install a C++17 compiler" in line
    backend, told = without_compiler.look_up()
    assert backend.startswith("reference (the kernels were not built: install ")
    assert sum("KernelsMissing" in line for line in told) == 1  # one warning at run time


def test_kernels_can_be_required(without_compiler, sources):
    command = [
        without_compiler.python,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--ignore-installed",
        "--no-build-isolation",
        ".",
    ]
    result = without_compiler.run(*command, folder=sources, ROBE_REQUIRE_KERNELS="1")
    assert result.returncode != 0
    (line,) = [line for line in result.stdout.splitlines() if MISSING in line]
    assert line.endswith("and ROBE_REQUIRE_KERNELS is set")
    assert not (without_compiler.site / "robe").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The wheel


def test_what_the_wheel_contains(wheel):
    assert re.fullmatch(rf"robe_dlrm-{re.escape(robe.__version__)}-py3-none-(linux|manylinux)\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
        information = f"robe_dlrm-{robe.__version__}.dist-info"
        metadata = email.message_from_bytes(files.read(f"{information}/METADATA"))
        tags = email.message_from_bytes(files.read(f"{information}/WHEEL"))
    assert {name.partition("/")[0] for name in names} == {"robe", "dlrm", "robe_files.py", "robe_json.py", information}
    modules = {str(path.relative_to(ROOT)) for package in ("robe", "dlrm") for path in (ROOT / package).rglob("*.py")}
    modules |= {"robe_files.py", "robe_json.py"}
    built = {f"{package}/{name}" for package in ("robe", "dlrm") for name in ("py.typed", "_cpu.so")}
    assert {name for name in names if not name.startswith(information)} == modules | built
    assert f"{information}/licenses/LICENSE" in names
    assert tags["Root-Is-Purelib"] == "false"
    assert metadata["Name"] == "robe-dlrm"
    assert metadata["Version"] == robe.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    required = {text for text in metadata.get_all("Requires-Dist") if "extra ==" not in text}
    assert required == {"torch>=2.10", "numpy>=1.26", "safetensors>=0.4"}
    assert set(metadata.get_all("Provides-Extra")) == {"train", "hub", "export", "loadgen", "bench", "triton"}
