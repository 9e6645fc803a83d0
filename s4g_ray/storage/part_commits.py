"""Record the finished parts of a job, so that the job can resume.

Small JSON files hold, for each part, the key of its inputs and its outcome; a marker file in the
job's folder holds the values that the job was begun with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from s4g_ray.errors import InputError, RunError, StoreError
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, open_part, read_part

WORK = "_work"  # the folder of commits within the artefact's; removed when that is published
Outcome = TypeVar("Outcome")
Files = Iterable[tuple[str, Part | None]]  # folder and part; None: no file


def read_commit(
    uri: str, key: str, parse: Callable[[Any], Outcome], files_of: Callable[[Outcome], Files]
) -> Outcome | None:
    """Return the outcome that was committed with the same key, if all of its files are intact.

    Returns None when there is no such commit, or when it or one of its files is cut short or
    altered. Raises StoreError when the object store fails.
    """
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
    except (KeyError, TypeError, AttributeError):  # JSON, but not a commit
        return None
    return outcome


def write_commit(uri: str, key: str, outcome: Any) -> None:
    """Commit the outcome (a dataclass) that was computed from a key. Write its files before."""
    files.write_json(uri, {"key": key, "outcome": asdict(outcome)})


def check_reached(folder: str, parts: Sequence[Part]) -> None:
    """Check that all parts lie in a local folder before it is published.

    Raises RunError when parts are missing: other nodes wrote them to their own disks.
    """
    if not files.is_local(folder):
        return
    lost = [part.name for part in parts if not _is_intact(folder, part)]
    if lost:
        raise RunError(
            f"{folder} lacks {len(lost)} of {len(parts)} parts that were written, such as"
            f" {lost[0]}: not all nodes reach it; choose s3://... or a folder that they share"
        )


def _is_intact(folder: str, part: Part) -> bool:
    try:
        # opens the file, because a shared file system may cache an older length
        open_part(folder, part).close()
    except RunError:
        return False
    return True


def claim_folder(
    folder: str,
    marker: str,
    made_with: dict[str, Any],
    by: str,
    meanings: Mapping[str, str] | None = None,
) -> None:
    """Take an empty folder, or resume in one that `by` has begun with the same values.

    The file `marker` in the folder holds the values. meanings: the words for those that are
    digests, which say nothing to a reader. Raises InputError for a folder that was begun with other
    values, one that holds other files, and one that cannot be written to.
    """
    uri = files.join(folder, marker)
    names = files.list_content(folder)
    made_with = json.loads(json.dumps(made_with))  # as it reads back
    if marker in names:
        begun_with = files.read_json(uri)
        if begun_with != made_with:
            found = _describe_differences(begun_with, made_with, meanings or {})
            raise InputError(f"{folder} was begun with {found}; remove it or choose another folder")
        return
    if names:
        raise InputError(f"{folder} is not empty, and was not begun by {by}; choose another folder")
    try:
        files.write_json(uri, made_with)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error}") from error


def _describe_differences(
    begun_with: Mapping[str, Any], made_with: Mapping[str, Any], meanings: Mapping[str, str]
) -> str:
    """Return the values that differ: as they are, and of digests the names."""
    digests: list[str] = []
    theirs, ours = _differing_values(begun_with, made_with, digests)
    parts = [f"{theirs}, not {ours}"] if theirs else []
    if digests:
        names = dict.fromkeys(meanings.get(name, name) for name in digests)
        parts.append(f"other {' and other '.join(names)}")
    return ", and with ".join(parts)


def _differing_values(
    begun_with: Mapping[str, Any], made_with: Mapping[str, Any], digests: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values that differ, of mappings within them too; append the names of digests."""
    theirs: dict[str, Any] = {}
    ours: dict[str, Any] = {}
    for key in {**begun_with, **made_with}:
        before = begun_with.get(key)
        now = made_with.get(key)
        if before == now:
            continue
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            before, now = _differing_values(before, now, digests)
            if not before:
                continue
        elif _is_digest(before) or _is_digest(now):
            digests.append(key)
            continue
        theirs[key] = before
        ours[key] = now
    return theirs, ours


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
