"""The house keeps its shape: which way imports go, what is private, how long files and functions are, who has tests."""

import ast
from pathlib import Path

import pytest

from tests.helpers.architecture import (
    circles,
    forbidden_imports,
    imports,
    long_files,
    long_functions,
    modules,
    private_uses,
    untested_modules,
)

ROOT = Path(__file__).parents[1]
PROGRAMS = ("train", "infer", "setup", "benchmarks")
# By package: what it must not import.
RULES = {
    "robe": ("dlrm", "data", *PROGRAMS),
    "dlrm": ("data", *PROGRAMS),
    "data": ("robe", "dlrm", *PROGRAMS),
    "robe_files": ("robe", "dlrm", "data", *PROGRAMS),
    "robe_json": ("robe", "dlrm", "data", *PROGRAMS),
}
MOST_LINES, MOST_LINES_OF_TRAIN = 600, 250
MOST_LINES_OF_A_FUNCTION, MOST_LINES_OF_A_FUNCTION_OF_TRAIN = 80, 60


@pytest.fixture
def tree(tmp_path):
    """Write files of a source tree: contents by path."""

    def write(**files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


# ---------------------------------------------------------------------------------------------------------------------
# The project


def test_all_modules_are_walked():
    names = modules(ROOT)
    assert {
        "train",
        "infer",
        "robe",
        "robe.ops.schema",
        "robe.triton_kernels",
        "dlrm.ops",
        "data.formats.opening",
    } <= set(names)
    graph = imports(ROOT)
    assert "robe.hashing" in graph["robe.ops.reference"]
    assert "robe.triton_kernels" in graph["robe.backends"]  # imported by the first call


def test_there_is_no_circle():
    assert circles(imports(ROOT)) == []


def test_imports_point_down():
    assert forbidden_imports(imports(ROOT), RULES) == []


def test_nobody_uses_private_names_of_another_module():
    assert private_uses(ROOT) == []


def test_the_schema_knows_no_backend():
    graph = imports(ROOT)
    below, waiting = set(), ["robe.ops"]
    while waiting:
        name = waiting.pop()
        if name not in below:
            below.add(name)
            waiting.extend(graph[name])
    assert not [name for name in below if name.startswith(("robe.backends", "robe.triton_kernels", "robe.admission"))]
    for name in below:
        calls = [
            node for node in ast.walk(ast.parse(modules(ROOT)[name].read_text())) if isinstance(node, ast.Attribute)
        ]
        assert not [node for node in calls if ast.unparse(node) == "ctypes.CDLL"]


def test_files_and_functions_are_short():
    assert long_files(ROOT, MOST_LINES) == []
    assert long_functions(ROOT, MOST_LINES_OF_A_FUNCTION) == []
    lines = (ROOT / "train.py").read_text().splitlines()
    assert len(lines) <= MOST_LINES_OF_TRAIN
    functions = [node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.FunctionDef)]
    assert max(node.end_lineno - node.lineno + 1 for node in functions) <= MOST_LINES_OF_A_FUNCTION_OF_TRAIN


def test_every_module_has_the_tests_of_its_name():
    assert untested_modules(ROOT) == []


# ---------------------------------------------------------------------------------------------------------------------
# Violations are found


@pytest.mark.parametrize(
    "statement",
    [
        "import robe.b",
        "from robe import b",
        "from robe.b import x",
        "def f():\n    from robe.b import x",
        "from . import b",
    ],
)
def test_circles_are_found_lazy_ones_included(tree, statement):
    root = tree(**{"robe/__init__.py": "", "robe/a.py": statement, "robe/b.py": "from robe.a import y"})
    assert circles(imports(root)) == [["robe.a", "robe.b", "robe.a"]]


def test_circles_through_a_package_are_found(tree):
    files = {
        "robe/__init__.py": "from robe.a import x",
        "robe/a.py": "from robe.b import x",
        "robe/b.py": "from robe import x",
    }
    assert circles(imports(tree(**files))) == [["robe", "robe.a", "robe.b", "robe"]]


def test_no_circle_is_found_where_there_is_none(tree):
    files = {
        "robe/__init__.py": "from robe import a, b",
        "robe/a.py": "import torch",
        "robe/b.py": "from robe.a import x",
    }
    assert circles(imports(tree(**files))) == []


@pytest.mark.parametrize(
    ("name", "statement", "wanted"),
    [
        ("robe/a.py", "import dlrm", "dlrm"),
        ("robe/a.py", "def f():\n    import data.rows", "data.rows"),
        ("dlrm/a.py", "from data.rows import Batch", "data.rows"),
        ("dlrm/a.py", "import train", "train"),
        ("data/a.py", "import dlrm.model", "dlrm"),
    ],
)
def test_imports_that_point_up_are_found(tree, name, statement, wanted):
    empty = dict.fromkeys(("robe/__init__.py", "dlrm/__init__.py", "data/__init__.py", "data/rows.py", "train.py"), "")
    root = tree(**empty, **{name: statement})
    assert forbidden_imports(imports(root), RULES) == [(name.replace("/", ".").removesuffix(".py"), wanted)]


@pytest.mark.parametrize(
    "statement",
    [
        "from robe.ops.layout import _check",
        "from robe.ops import layout\nlayout._check()",
        "import robe.ops.layout\nrobe.ops.layout._check()",
        "import robe.ops.layout as names\ndef f():\n    return names._check",
    ],
)
def test_uses_of_private_names_are_found(tree, statement):
    files = {"robe/__init__.py": "", "robe/ops/__init__.py": "", "robe/ops/layout.py": "_check = print"}
    (found,) = private_uses(tree(**files, **{"dlrm/a.py": statement}))
    assert found.endswith(": robe.ops.layout._check")
    assert found.startswith("dlrm/a.py:")


def test_long_files_and_functions_are_found(tree):
    python = "def short():\n    pass\n\n\nclass C:\n    def long(self):\n" + "        pass\n" * 9
    cpp = """
namespace robe {
namespace {
struct S {
  int x{3};
  void member(int y) {
    if (y) { x = '}'; }
    // }
    x = 1;
    x = 2;
    x = 3;
    x = 4;
    x = 5;
  }
};
int one() { return 1; }
const std::vector<int> several = {1, 2};
template <class T>
void outer(T t) {
  const auto f = [&](int i) {
    t(i);
    t("{");
  };
  f(1);
  f(2);
  f(3);
  f(4);
}
}  // namespace
}  // namespace robe
"""
    root = tree(**{"robe/a.py": python, "robe/csrc/b.h": cpp})
    assert long_files(root, 20) == ["robe/csrc/b.h: 30"]
    assert long_functions(root, 8) == [
        "robe/a.py:6: long, 10",
        "robe/csrc/b.h:6: member, 9",
        "robe/csrc/b.h:18: outer, 11",
    ]


def test_modules_without_tests_are_found(tree):
    files = dict.fromkeys(
        ("robe/__init__.py", "robe/__main__.py", "robe/a.py", "dlrm/x/b.py", "tests/robe/test_a.py"), ""
    )
    assert untested_modules(tree(**files)) == [
        "dlrm.x.b: expected tests/dlrm/x/test_b.py",
        "robe.__main__: expected tests/robe/test_main.py",
    ]
