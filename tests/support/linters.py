"""Find the linters of files that are not Python."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def find_linter(name: str) -> str:
    """Return the path of a linter that the development dependencies install."""
    folders = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = shutil.which(name, path=folders)
    assert found, f"{name} is missing: install the dev extra"
    return found
