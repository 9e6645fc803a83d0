"""Find calls of rich that would read a user's text as markup or as emoji.

Consoles are made by progress.make_console, which turns both off, for tables too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

MAKER = ("s4g_ray/progress.py", "make_console")


def find_markup(path: str, source: str) -> list[str]:
    """Return the breaches of a file, each with its line."""
    tree = ast.parse(source)
    made_at = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and (path, function.name) == MAKER
        for node in ast.walk(function)
    }
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        line = node.lineno if isinstance(node, ast.stmt | ast.expr) else 0
        found.extend((line, breach) for breach in _breaches(node, is_maker=id(node) in made_at))
    return [f"{path}:{line}: {breach}" for line, breach in sorted(found)]


def _breaches(node: ast.AST, *, is_maker: bool) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom) and node.module is not None:
        names = {alias.name for alias in node.names}
        if node.module == "rich.markup" or (node.module == "rich" and names & {"markup", "print"}):
            yield f"imports {node.module}"
    elif isinstance(node, ast.Import) and any(a.name.startswith("rich") for a in node.names):
        yield "imports rich itself; import what is used"
    elif isinstance(node, ast.Attribute) and node.attr in ("from_markup", "assemble_markup"):
        yield node.attr
    elif isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        off = {
            keyword.arg
            for keyword in node.keywords
            if isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        }
        if name == "Console" and not (is_maker and {"markup", "emoji"} <= off):
            yield "Console: use progress.make_console"
        if name == "TextColumn" and "markup" not in off and _is_of_rich(node):
            yield "TextColumn without markup=False"


def _is_of_rich(call: ast.Call) -> bool:
    """Return whether a TextColumn is that of a progress bar, not that of data/tables."""
    first = call.args[0] if call.args else None
    return isinstance(first, ast.Constant | ast.JoinedStr) and len(call.args) == 1


def find_in_package(root: Path) -> list[str]:
    """Return the breaches of all files of the package."""
    found = []
    for path in sorted((root / "s4g_ray").rglob("*.py")):
        found += find_markup(str(path.relative_to(root)), path.read_text())
    return found
