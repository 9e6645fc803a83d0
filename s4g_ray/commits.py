"""Commits: small JSON files beside a job's parts, which say what was made from what, for a job that starts again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, TypeVar

from s4g_ray import storage
from s4g_ray.errors import RunError

WORK = "_work"  # the folder of commits, in that of the artefact; removed when it is published
Outcome = TypeVar("Outcome")
Files = Iterable[tuple[str, storage.Part | None]]


def read_commit(
    uri: str, key: str, parse: Callable[[Any], Outcome], files: Callable[[Outcome], Files]
) -> Outcome | None:
    """What was committed from the same key, where its files (folder and part; None: no file) are whole; else None."""
    try:
        value = storage.read_json(uri)
        if value["key"] != key:
            return None
        outcome = parse(value["outcome"])
        for folder, part in files(outcome):
            if part is not None:
                storage.read_part(folder, part)
    except (FileNotFoundError, RunError):  # not computed yet; cut short or altered
        return None
    except (KeyError, TypeError, AttributeError):  # JSON, but no commit
        return None
    return outcome


def write_commit(uri: str, key: str, outcome: Any) -> None:
    """Commit what was made from a key: a dataclass. Its files come first."""
    storage.write_json(uri, {"key": key, "outcome": asdict(outcome)})
