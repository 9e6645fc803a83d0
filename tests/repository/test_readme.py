from __future__ import annotations

import re
from pathlib import Path

import pytest

from s4g_ray.data.dataset import open_dataset

ROOT = Path(__file__).parents[2]


def test_the_readmes_own_data_example_makes_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    dataset = open_dataset("data/paris")
    assert dataset.table("queries", ["test"]).uris == [f"{tmp_path}/data/paris/photos/b.jpg"]
    assert len(dataset.pairs("train")) == 1
    assert len(code.splitlines()) <= 22


def test_the_readmes_tree_names_every_module() -> None:
    text = (ROOT / "README.md").read_text()
    for path in (ROOT / "s4g_ray").rglob("*.py"):
        assert path.name == "__init__.py" or path.name in text, path
