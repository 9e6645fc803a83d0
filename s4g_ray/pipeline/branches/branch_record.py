"""Branch: a run that continues from an earlier checkpoint, as run.json records it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

Changes = Mapping[str, list[Any]]  # key -> [old value, new value]
FOLDER = "branches"
BRANCH_CONFIG = "branch.yaml"  # in branches/NAME/: the values of the branch, while it is made
REPLACED = "replaced"  # the status of a run's former line, in its run.json


@dataclass(frozen=True)
class Branch:
    """A branch of a run, as run.json records it.

    name: of the folder below branches/ that keeps what followed. changed: of the keys that decide
    what is computed. removed: what followed and is not kept, relative to the run folder.
    """

    name: str
    from_epoch: int
    changed: Changes
    removed: list[str]

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Read a branch from its entry in run.json."""
        return cls(**{key: record[key] for key in cls.__dataclass_fields__})

    def as_record(self) -> dict[str, Any]:
        """Return the entry of run.json, and of metrics.jsonl."""
        return asdict(self)

    @property
    def folder(self) -> str:
        """Return where what followed is kept, relative to the run folder."""
        return f"{FOLDER}/{self.name}"

    def summary(self) -> str:
        """Return a line that names the epoch and the changed values."""
        return describe_branch(self.as_record())


def describe_branch(record: Mapping[str, Any]) -> str:
    """Return a line about a branch's record: `branch from epoch 4: train.epochs 8 -> 9`."""
    changed = [f"{key} {old} -> {new}" for key, (old, new) in record["changed"].items()]
    return (
        f"branch from epoch {record['from_epoch']}: {', '.join(changed) or 'no value changed'};"
        f" what followed is kept in {FOLDER}/{record['name']}"
    )
