"""Small JSON files of a job that starts again: what its folder was begun with, and what each part was made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from s4g_ray.errors import InputError, RunError, StoreError
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, open_part, read_part

WORK = "_work"  # the folder of commits, in that of the artefact; removed when it is published
Outcome = TypeVar("Outcome")
Files = Iterable[tuple[str, Part | None]]


def read_commit(
    uri: str, key: str, parse: Callable[[Any], Outcome], files_of: Callable[[Outcome], Files]
) -> Outcome | None:
    """What was committed from the same key, where its files (folder and part; None: no file) are whole; else None."""
    try:
        value = files.read_json(uri)
        if value["key"] != key:
            return None
        outcome = parse(value["outcome"])
        for folder, part in files_of(outcome):
            if part is not None:
                read_part(folder, part)
    except StoreError:
        raise
    except (FileNotFoundError, RunError):  # not computed yet; cut short or altered
        return None
    except (KeyError, TypeError, AttributeError):  # JSON, but no commit
        return None
    return outcome


def write_commit(uri: str, key: str, outcome: Any) -> None:
    """Commit what was made from a key: a dataclass. Its files come first."""
    files.write_json(uri, {"key": key, "outcome": asdict(outcome)})


def check_reached(folder: str, parts: Sequence[Part]) -> None:
    """Before a local folder is published: raises RunError for parts that are not in it, but on other nodes' disks."""
    if not files.is_local(folder):
        return
    lost = [part.name for part in parts if not _is_there(folder, part)]
    if lost:
        raise RunError(
            f"{folder} lacks {len(lost)} of {len(parts)} parts that were written, such as {lost[0]}: not all nodes"
            " reach it; choose s3://... or a folder that they share"
        )


def _is_there(folder: str, part: Part) -> bool:
    try:
        open_part(folder, part).close()  # opened: a shared file system may remember an older length
    except RunError:
        return False
    return True


def claim_folder(folder: str, marker: str, made_with: dict[str, Any], by: str) -> None:
    """Take a new folder, or go on in one that `by` has begun with the same values, as its file `marker` says.

    Raises InputError for any other folder that holds something, and for one that cannot be written to.
    """
    found, uri = files.list_names(folder), files.join(folder, marker)
    names = [
        name for name in found if not (name.startswith(".") and name.endswith(".tmp"))
    ]  # of a start cut off
    made_with = json.loads(json.dumps(made_with))  # as it is read again
    if marker in names and (begun := files.read_json(uri)) != made_with:
        differing = [key for key in {**begun, **made_with} if begun.get(key) != made_with.get(key)]
        theirs, ours = (
            {key: values.get(key) for key in differing} for values in (begun, made_with)
        )
        raise InputError(f"{folder} was begun with {theirs}, not {ours}; choose another folder")
    if names and marker not in names:
        raise InputError(f"{folder} is not empty, and was not begun by {by}; choose another folder")
    if names:
        return
    try:
        files.write_json(uri, made_with)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error}") from error
