"""Without the extra that reads imagery, one error names the command that installs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

NAMES = ("convert", "sources", "imagery", "tile_reader")


@pytest.mark.parametrize("missing", ["rasterio", "shapely"])
def test_imports_without_the_extra_name_it(missing: str) -> None:
    code = f"""
import importlib, sys
from s4g_ray.errors import InputError
sys.modules[{missing!r}] = None
for name in {NAMES!r}:
    try:
        importlib.import_module("s4g_ray.datasets.imagery." + name)
    except InputError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(NAMES), done.stdout
    assert set(lines) == {
        f"reading imagery needs {missing}, which is not installed; pip install 's4g-ray[imagery]'"
    }
