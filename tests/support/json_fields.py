"""The fields of JSON that docs/commands.md gives for each command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[2] / "docs/commands.md"


class Fields(NamedTuple):
    """Fields of the object, and those of the objects in its last list, if it has one."""

    own: set[str]
    nested: set[str]


def documented(command: str) -> Fields:
    """Return the fields of a command's row, such as `s4g check`."""
    rows = re.findall(r"^\| `([^|]+)` \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    (text,) = [fields for name, fields in rows if name == command]
    own, _, nested = text.partition(": a list of ")
    return Fields(set(re.findall(r"`([\w@%]+)`", own)), set(re.findall(r"`([\w@%]+)`", nested)))
