"""Find calls in Python source by which data from storage could run code or write elsewhere."""

from __future__ import annotations

import ast
from collections.abc import Iterator

PICKLERS = (
    "pickle",
    "cPickle",
    "_pickle",
    "cloudpickle",
    "ray.cloudpickle",
    "dill",
    "joblib",
    "shelve",
    "marshal",
)
FORBIDDEN = {
    "eval",
    "exec",
    "__import__",
    "builtins.eval",
    "builtins.exec",
    "builtins.__import__",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "shutil.unpack_archive",
    "torch.jit.load",
    "torch.hub.load",
    "pandas.read_pickle",
    "numpy.lib.format.read_array",
    "ray.data.read_parquet",
}
TORCH = {"torch.load", "torch.serialization.load"}
NUMPY = {"numpy.load", "numpy.lib.npyio.load"}
ALLOW_PICKLE = 2  # its position among the arguments of numpy.load
GUARD = "refuse_extension_types"
YAML = {"safe_load", "safe_load_all", "safe_dump", "safe_dump_all"}


def dangerous_calls(source: str) -> list[str]:
    """Return `line: name` of each dangerous call, and of each import of a module that unpickles."""
    tree = ast.parse(source)
    names = dict(_imported(tree))
    names |= dict(_aliases(tree, names))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found += [(node.lineno, name) for name in _modules(node) if _unpickles(name)]
        elif isinstance(node, ast.Call):
            called = _dotted(node.func, names)
            if _is_dangerous(called, node):
                found.append((node.lineno, called))
    return [f"{line}: {name}" for line, name in sorted(found)]


def unguarded_parquet_reads(source: str) -> list[int]:
    """Return the lines that read a Parquet file without `refuse_extension_types`.

    A read is `pq.read_table(...)`, `.read_row_group...(...)`, `.iter_batches(...)` or
    `.read(columns=...)` of any object. It is guarded inside the first argument of
    `refuse_extension_types`, or if the same function passes its result to it by name; batches, if
    the same function calls it.
    """
    tree = ast.parse(source)
    lines = []
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
            guards = [
                arg for call in calls if _dotted(call.func, {}) == GUARD for arg in call.args[:1]
            ]
            safe = {id(node) for guard in guards for node in ast.walk(guard)}
            if guards:
                safe |= {id(call) for call in calls if _is_named(call, "iter_batches")}
            given = {guard.id for guard in guards if isinstance(guard, ast.Name)}
            for node in ast.walk(function):
                if (
                    isinstance(node, ast.Assign)
                    and {t.id for t in node.targets if isinstance(t, ast.Name)} & given
                ):
                    safe |= {id(inner) for inner in ast.walk(node.value)}
            lines += [
                call.lineno for call in calls if _reads_parquet(call) and id(call) not in safe
            ]
    return lines


def _is_named(call: ast.Call, name: str) -> bool:
    return _dotted(call.func, {}).rpartition(".")[2] == name


def _reads_parquet(call: ast.Call) -> bool:
    last = _dotted(call.func, {}).rpartition(".")[2]
    return (
        last == "read_table"
        or last == "iter_batches"
        or last.startswith("read_row_group")
        or (last == "read" and any(word.arg == "columns" for word in call.keywords))
    )


def _imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield each imported name of a module, and the full name of the object that it refers to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    yield alias.asname, alias.name
                else:
                    top = alias.name.split(".")[0]
                    yield top, top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _aliases(tree: ast.Module, names: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each name of `name = module.function`, and the full name of a function to check."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute):
            called = _dotted(node.value, names)
            if called in {*FORBIDDEN, *TORCH, *NUMPY, "PIL.Image.open"} or called.startswith(
                "yaml."
            ):
                yield from (
                    (target.id, called) for target in node.targets if isinstance(target, ast.Name)
                )


def _modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names]


def _unpickles(name: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in PICKLERS)


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    """Return the full name: `np.load` -> numpy.load, `open(x).extractall` -> .extractall."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def _is_dangerous(called: str, call: ast.Call) -> bool:
    given = {
        word.arg: word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)
    }
    last = called.rsplit(".", 1)[-1]
    return (
        called in FORBIDDEN
        or _unpickles(called)
        or called.startswith("os.exec")
        or (
            called in {*TORCH, *NUMPY, "PIL.Image.open"}
            and any(word.arg is None for word in call.keywords)
        )
        or (called in TORCH and given.get("weights_only") is not True)
        or (
            called in NUMPY
            and (_may_be_true("allow_pickle", call) or len(call.args) > ALLOW_PICKLE)
        )
        or (called.startswith("yaml.") and last not in YAML)
        or (last in ("extract", "extractall") and given.get("filter") != "data")
        or (
            called == "PIL.Image.open" and not any(word.arg == "formats" for word in call.keywords)
        )  # without `formats`, Pillow opens EPS files, which are programs
        or _may_be_true("shell", call)
    )


def _may_be_true(keyword: str, call: ast.Call) -> bool:
    values = [word.value for word in call.keywords if word.arg == keyword]
    return any(not (isinstance(value, ast.Constant) and value.value is False) for value in values)
