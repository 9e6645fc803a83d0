"""Add the pages of the documentation site that are not in docs/, and make all links lead there.

MkDocs calls `on_files` and `on_page_markdown`; mkdocs.yml names this file.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# files of the repository that are pages of the site
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "cluster/README.md": "cluster.md",
}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the repository, and those that are made from its code."""
    from mkdocs.structure.files import File

    made = {page: (ROOT / source).read_text() for source, page in PAGES.items()}
    made["api.md"] = write_api_page((ROOT / "s4g_ray/__init__.pyi").read_text())
    made["packages.md"] = write_packages_page(ROOT / "s4g_ray")
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make the links of a page lead to pages of the site."""
    folder = {page_name: source for source, page_name in PAGES.items()}.get(page.file.src_uri)
    base = Path("docs") if folder is None else Path(folder).parent
    return rewrite_links(markdown, base)


def rewrite_links(markdown: str, base: Path) -> str:
    """Replace links to files of the repository by those to the site's pages.

    base: the folder of the page in the repository. A link to a file that is no page, such as a
    configuration, becomes its text.
    """

    def replace(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, _, anchor = target.partition("#")
        if "://" in target or not path:
            return match[0]
        found = find_page(path, base)
        if found is None:
            return text
        return f"[{text}]({found}{'#' + anchor if anchor else ''})"

    return re.sub(r"(?<!!)\[([^\]\[]+)\]\(([^)\s]+)\)", replace, markdown)


def find_page(path: str, base: Path) -> str | None:
    """Return the page of the site for a path that is relative to `base`; None without one."""
    target = (ROOT / base / path).resolve().relative_to(ROOT).as_posix()
    if target in PAGES:
        return PAGES[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    package = re.fullmatch(r"s4g_ray/(\w+)/__init__\.py", target)
    return f"packages.md#{package[1]}" if package else None


def list_public_names(stub: str) -> list[tuple[str, str]]:
    """Return module and name of what a stub file makes public, in its order."""
    found = []
    for node in ast.parse(stub).body:
        if isinstance(node, ast.ImportFrom):
            found += [(f"s4g_ray.{node.module}", alias.name) for alias in node.names]
    return found


def write_api_page(stub: str) -> str:
    """Return a page of all public names, which mkdocstrings fills from their docstrings."""
    names = list_public_names(stub)
    parts = [
        "# Python interface",
        "What `from s4g_ray import NAME` gives. Records are what callbacks of a run receive.",
    ]
    for records in (False, True):
        parts += ["## Records" if records else "## Functions and classes"]
        for module, name in names:
            if name.endswith("Record") is records:
                parts.append(f"::: {module}.{name}\n    options:\n      heading_level: 3")
    return "\n\n".join(parts) + "\n"


def write_packages_page(root: Path) -> str:
    """Return a page of the packages, each with its docstring, which lists its modules."""
    parts = ["# Packages", "Each lists its modules in the order of use."]
    for init in sorted(root.glob("*/__init__.py")):
        docstring = ast.get_docstring(ast.parse(init.read_text())) or ""
        parts += [f"## {init.parent.name}", f"```text\n{docstring}\n```"]
    return "\n\n".join(parts) + "\n"
