from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from s4g_ray.data.dataset import open_dataset
from tests.support.package_rules import modules_in_docstring, modules_in_folder

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FOLDERS = sorted(path.parent for path in (ROOT / "s4g_ray").glob("*/**/__init__.py"))


def test_the_readmes_data_example_makes_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    dataset = open_dataset("data/paris")
    assert list(dataset.table("queries", ["test"]).uris) == [f"{tmp_path}/data/paris/photos/b.jpg"]
    assert len(dataset.pairs("train")) == 1
    assert len(code.splitlines()) <= 22


def test_the_readme_has_at_most_200_lines() -> None:
    assert len(README.splitlines()) <= 200


def test_the_readme_lists_every_package_and_no_other() -> None:
    rows = re.findall(r"^\| \[(\w+)\]\(s4g_ray/(\w+)/__init__\.py\) \| \S.* \|$", README, re.M)
    assert all(name == folder for name, folder in rows)
    packages = [path.parent.name for path in (ROOT / "s4g_ray").glob("*/__init__.py")]
    assert sorted(name for name, _ in rows) == sorted(packages)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_packages_docstring_lists_every_module_and_no_other(folder: Path) -> None:
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    listed = modules_in_docstring(docstring or "")
    assert sorted(listed) == sorted(modules_in_folder(folder))


def test_modules_are_read_from_a_docstring_and_from_a_folder(tmp_path: Path) -> None:
    docstring = """Read data.

    places      two words here
                and a second line
    images_v2   other words
    tables/     a folder

    Not a module, nor is this:

        index = build()  # with a comment
    one space
    """
    listed = modules_in_docstring(ast.get_docstring(ast.parse(f'"""{docstring}"""')) or "")
    assert listed == ["places", "images_v2", "tables/"]
    for name in ("__init__.py", "places.py", "tables/__init__.py", "not_a_package/x.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert modules_in_folder(tmp_path) == {"places", "tables/"}
