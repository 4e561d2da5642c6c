"""Walks over the sources of the project: who imports whom, who uses whose private names, and how long things are.

All functions take the root of a source tree, so that tests can plant violations in a tree of their own.
"""

import ast
import re
from collections.abc import Iterator

PACKAGES = ("robe", "dlrm", "data", "benchmarks")
SOURCE_SUFFIXES = (".py", ".h", ".cpp")


def modules(root):
    """Paths of the Python modules of all packages and the programs, by dotted name; a package has its own name."""
    found = {path.stem: path for path in root.glob("*.py")}
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root):
    """The modules of the project that each module imports, wherever in it the import stands.

    ``from package import name`` is an import of package.name where that is a module, and of the package otherwise.
    """
    known = modules(root)
    graph = {}
    for name, path in known.items():
        wanted = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted |= {_longest(alias.name, known) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = _base(node, name, path)
                wanted |= {_longest(f"{base}.{alias.name}", known) for alias in node.names}
        graph[name] = wanted - {None, name}
    return graph


def _base(node, name, path):
    """The absolute name of the module that a ``from ... import`` names."""
    if not node.level:
        return node.module
    parts = name.split(".")
    parts = parts[: len(parts) - node.level + (path.name == "__init__.py")]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _longest(name, known):
    """The module that a dotted name leads to; None outside the project."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def circles(graph):
    """The circles of a graph, each as the names along it; one for each group of modules that reach each other."""
    found, done = [], set()
    for start in sorted(graph):
        if start in done:
            continue
        path = _way_back(graph, start)
        if path:
            found.append(path)
            done |= set(path)
    return found


def _way_back(graph, start):
    """A shortest way from a module to itself, or None."""
    ways = [[start]]
    seen = set()
    while ways:
        way = ways.pop(0)
        for following in sorted(graph[way[-1]]):
            if following == start:
                return [*way, start]
            if following not in seen:
                seen.add(following)
                ways.append([*way, following])
    return None


def forbidden_imports(graph, rules):
    """The imports that rules forbid: pairs (module, imported).

    Args:
        rules: by package: the packages that it must not import; "package: except" names are given as full modules.
    """
    return sorted(
        (name, wanted)
        for name, all_wanted in graph.items()
        for wanted in all_wanted
        if wanted.split(".")[0] in rules.get(name.split(".")[0], ())
    )


def private_uses(root):
    """Uses of another module's underscore names: "path:line: name".

    Counted are ``from module import _name`` and ``module._name`` where module is one of the project's, under whatever
    name it was imported.
    """
    known = modules(root)
    found = []
    for name, path in known.items():
        tree = ast.parse(path.read_text())
        aliases = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if _longest(alias.name, known):
                        aliases[alias.asname or alias.name] = alias.name
            elif isinstance(node, ast.ImportFrom):
                base = _base(node, name, path)
                for alias in node.names:
                    full = f"{base}.{alias.name}"
                    if full in known:
                        aliases[alias.asname or alias.name] = full
                    elif _longest(base, known) and _is_private(alias.name):
                        found.append(f"{path.relative_to(root)}:{node.lineno}: {full}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and _is_private(node.attr):
                owner = _dotted(node.value)
                if owner in aliases:
                    found.append(f"{path.relative_to(root)}:{node.lineno}: {aliases[owner]}.{node.attr}")
    return sorted(found)


def _is_private(name):
    return name.startswith("_") and not name.startswith("__")


def _dotted(node):
    """ "a.b" of the expression a.b; None of any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value)
        return owner and f"{owner}.{node.attr}"
    return None


def sources(root):
    """All files of code, tests included."""
    for folder in (*PACKAGES, "tests"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SOURCE_SUFFIXES:
                yield path
    yield from sorted(root.glob("*.py"))


def long_files(root, most):
    """Files with more lines than ``most``: "path: lines"."""
    lengths = ((path, len(path.read_text().splitlines())) for path in sources(root))
    return [f"{path.relative_to(root)}: {length}" for path, length in lengths if length > most]


def long_functions(root, most):
    """Functions with more lines than ``most``, in Python and C++, first to last line: "path:line: name, lines"."""
    found = []
    for path in sources(root):
        functions = _functions_of_python(path) if path.suffix == ".py" else _functions_of_cpp(path)
        for name, first, length in functions:
            if length > most:
                found.append(f"{path.relative_to(root)}:{first}: {name}, {length}")
    return found


def _functions_of_python(path) -> Iterator[tuple[str, int, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.lineno, node.end_lineno - node.lineno + 1


# A block of C++ that is no function: what stands before its brace.
_SCOPES = re.compile(r"^(extern\b|((inline|static|template\s*<[^{]*>)\s+)*(namespace|struct|class|enum|union)\b)")
_CODE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.DOTALL)


def _functions_of_cpp(path) -> Iterator[tuple[str, int, int]]:
    """The outermost blocks that are no namespace, class or enumeration, from their first word to the closing brace."""
    # Comments, strings and macros hold no braces that count; lines stay where they are.
    text = _CODE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), path.read_text())
    text = re.sub(
        r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", lambda match: re.sub(r"[^\n]", " ", match[0]), text, flags=re.MULTILINE
    )
    scopes, begin = [], 0
    for match in re.finditer(r"[{};]", text):
        inside = "function" in scopes
        if match[0] == "{":
            before = text[begin : match.start()]
            kind = "scope" if _SCOPES.match(before.strip()) or not before.strip() else "function"
            scopes.append("block" if inside else kind)
            if scopes[-1] == "function":
                first = begin + len(before) - len(before.lstrip())
        elif match[0] == "}":
            if not scopes:
                raise ValueError(f"{path}: expected as many braces that open as close")
            if scopes.pop() == "function":
                start = text.count("\n", 0, first) + 1
                head = " ".join(text[first : text.index("{", first)].split())
                yield head.partition("(")[0].split()[-1], start, text.count("\n", 0, match.start()) + 2 - start
        if "function" not in scopes:
            begin = match.end()
    if scopes:
        raise ValueError(f"{path}: expected as many braces that close as open")


def untested_modules(root):
    """The modules without a test file of their name; packages are tested by those of their modules."""
    missing = []
    for name, path in modules(root).items():
        if path.name == "__init__.py" or path.name == "setup.py":
            continue
        test = root / "tests" / path.relative_to(root).with_name(f"test_{path.stem.strip('_')}.py")
        if not test.is_file():
            missing.append(f"{name}: expected {test.relative_to(root)}")
    return sorted(missing)
