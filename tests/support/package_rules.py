"""Check the rules of the source tree: imports, names, sizes and package docstrings. Nothing is run.

Each `find_` function takes parsed files and returns a string for each breach, which names file and
line.
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PROJECT = "s4g_ray"
MAX_INIT_LINES = 30
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_COLUMNS = 100
MAX_MODULES = 12
SUPPRESSION = "fmt: " + "skip"
PRAGMA = re.compile(r"  # (type: ignore|noqa)\b.*")  # does not count as columns, as in ruff
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """A Python file: its path below the root of the repository, its text and its syntax tree."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        """The dotted name: `s4g_ray.data.places`; of an `__init__.py`, that of its package."""
        parts = self.path.with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def package(self) -> str:
        """The folder or file of s4g_ray/ that holds it: `data`, `errors`; "" of s4g_ray itself."""
        return package_of(self.module)


@dataclass(frozen=True)
class Import:
    """One imported name. `import a.b` has module `a.b` and no name."""

    module: str
    name: str
    line: int

    @property
    def target(self) -> str:
        """The dotted name of all that is imported: `a.b.c` of `from a.b import c`."""
        return f"{self.module}.{self.name}" if self.name else self.module


def package_of(module: str) -> str:
    """The second part of a dotted name: `data` of `s4g_ray.data.places`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def read_sources(root: Path, *folders: str) -> list[Source]:
    """Parse all Python files below some folders of a repository."""
    sources = []
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            text = path.read_text()
            sources.append(Source(path.relative_to(root), text, ast.parse(text)))
    return sources


def imports_of(tree: ast.AST) -> list[Import]:
    """The imports anywhere below a node of a syntax tree. Relative ones keep their dots."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, "", node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found += [Import(module, alias.name, node.lineno) for alias in node.names]
    return found


def find_wrong_imports(sources: Iterable[Source], allowed: Mapping[str, set[str]]) -> list[str]:
    """Imports that `allowed` does not list for the importing package; files of unlisted packages.

    A package may import itself. Imports inside functions and for type checkers count too. Relative
    imports are wrong.
    """
    found = []
    for source in sources:
        if not source.package:
            continue
        if source.package not in allowed:
            found.append(f"{source.path}: the package {source.package} has no level")
            continue
        for imported in imports_of(source.tree):
            if imported.module.startswith("."):
                found.append(f"{source.path}:{imported.line}: a relative import")
            if imported.target in (PROJECT, f"{PROJECT}.__version__"):
                continue
            if not is_own(imported.target):
                continue
            package = package_of(imported.target)
            if package not in {source.package, *allowed[source.package]}:
                found.append(f"{source.path}:{imported.line}: {source.package} imports {package}")
    return found


def is_own(target: str) -> bool:
    """Whether a dotted name belongs to this project."""
    return target.split(".")[0] == PROJECT


def find_circle(sources: Iterable[Source]) -> list[str]:
    """The modules of one circle of imports at module level, or an empty list."""
    trees = {source.module: source.tree for source in sources}
    graph: dict[str, set[str]] = {}
    for module, tree in trees.items():
        statements = ast.Module(
            [node for node in tree.body if isinstance(node, ast.ImportFrom | ast.Import)], []
        )
        imported = imports_of(statements)
        targets = {item.target if item.target in trees else item.module for item in imported}
        graph[module] = targets & trees.keys()
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle: list[str] = error.args[1]
        return circle
    return []


def importers(sources: Iterable[Source], library: str) -> set[str]:
    """The paths of the files that import a library, at any place in them."""
    found = set()
    for source in sources:
        if any(item.module.split(".")[0] == library for item in imports_of(source.tree)):
            found.add(str(source.path))
    return found


def find_private_names(sources: Iterable[Source]) -> list[str]:
    """Underscored names of another file of this project: imported, or read from what is imported.

    `__version__` is public.
    """
    found = []
    for source in sources:
        imported = [item for item in imports_of(source.tree) if is_own(item.target)]
        used = [(item.line, item.name) for item in imported]
        used += attributes_of(source.tree, {item.name for item in imported})
        for line, name in used:
            if is_private(name.rpartition(".")[2]):
                found.append(f"{source.path}:{line}: {name}")
    return found


def attributes_of(tree: ast.AST, names: set[str]) -> list[tuple[int, str]]:
    """Line and text of each `name.attribute` and `function(name, "attribute")`, for some names.

    The second form patches an attribute: `monkeypatch.setattr(name, "attribute", ...)`.
    """
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attribute):
                pass
            case ast.Call(args=[ast.Name(id=name), ast.Constant(value=str(attribute)), *_]):
                pass
            case _:
                continue
        if name in names:
            found.append((node.lineno, f"{name}.{attribute}"))
    return found


def is_private(name: str) -> bool:
    """Whether a name begins with an underscore and is not of the form `__name__`."""
    return name.startswith("_") and not name.endswith("__")


def find_wrong_inits(sources: Iterable[Source]) -> list[str]:
    """`__init__.py` files that are too long, or hold more than a docstring.

    s4g_ray's own loads the public names, too.
    """
    found = []
    for source in sources:
        if source.path.name != "__init__.py":
            continue
        if len(source.text.splitlines()) > MAX_INIT_LINES:
            found.append(f"{source.path}: more than {MAX_INIT_LINES} lines")
        if ast.get_docstring(source.tree) is None:
            found.append(f"{source.path}: no docstring")
            continue
        statements = [ast.unparse(node) for node in source.tree.body[1:]]
        if source.module == PROJECT:
            statements = [text for text in statements if not is_lazy_loading(text)]
        if statements:
            found.append(f"{source.path}: {statements[0]}")
    return found


def is_lazy_loading(statement: str) -> bool:
    """Whether a statement is one of those by which s4g_ray loads its public names."""
    patterns = (
        r"import lazy_loader",
        r"__version__ = '[\d.]+'",
        r"__getattr__, __dir__, __all__ = lazy_loader\.attach_stub\(__name__, __file__\)",
    )
    return any(re.fullmatch(pattern, statement) for pattern in patterns)


def modules_in_docstring(docstring: str) -> list[str]:
    """The modules and folders that a package's docstring lists.

    Each is a line: a name, two or more spaces, and a text.
    """
    return re.findall(r"^([a-z_][a-z_0-9]*/?) {2,}\S", docstring, re.MULTILINE)


def modules_in_folder(folder: Path) -> set[str]:
    """The modules of a package, and its folders with a slash at the end."""
    modules = {path.stem for path in folder.glob("*.py") if path.name != "__init__.py"}
    return modules | {f"{path.parent.name}/" for path in folder.glob("*/__init__.py")}


def find_full_folders(sources: Iterable[Source]) -> list[str]:
    """Folders of more than MAX_MODULES modules."""
    counts = Counter(source.path.parent for source in sources if source.path.name != "__init__.py")
    return [f"{folder}: {count} modules" for folder, count in counts.items() if count > MAX_MODULES]


def find_long_code(sources: Iterable[Source]) -> list[str]:
    """Files, functions and lines that are too long, and lines excluded from formatting."""
    found = []
    for source in sources:
        lines = source.text.splitlines()
        if len(lines) > MAX_FILE_LINES:
            found.append(f"{source.path}: {len(lines)} lines")
        for number, line in enumerate(lines, 1):
            columns = len(PRAGMA.sub("", line))
            if columns > MAX_COLUMNS:
                found.append(f"{source.path}:{number}: {columns} columns")
            if SUPPRESSION in line:
                found.append(f"{source.path}:{number}: {SUPPRESSION}")
        for function in functions_of(source.tree):
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{source.path}:{function.lineno}: {function.name}: {length} lines")
    return found


def find_missing_annotations(sources: Iterable[Source]) -> list[str]:
    """Parameters and returns without an annotation; `self` and `cls` need none."""
    found = []
    for source in sources:
        for function in functions_of(source.tree):
            place = f"{source.path}:{function.lineno}: {function.name}"
            if function.returns is None:
                found.append(f"{place}: return")
            bare = [item.arg for item in parameters_of(function) if item.annotation is None]
            found += [f"{place}: {name}" for name in bare if name not in ("self", "cls")]
    return found


def functions_of(tree: ast.AST) -> Iterator[Function]:
    """All functions and methods below a node, nested ones too."""
    for node in ast.walk(tree):
        if isinstance(node, Function):
            yield node


def parameters_of(function: Function) -> list[ast.arg]:
    """The parameters of a function, of every kind."""
    arguments = function.args
    variadic = [arg for arg in (arguments.vararg, arguments.kwarg) if arg is not None]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *variadic]
