"""Plan a mining job: its groups of queries, and the outcome of each task. No Ray.

A *group* is a run of consecutive parts of the queries' embeddings. The table is in the order of
places, so no place is in two groups. The driver reads the table's ids and places part by part.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from s4g_ray.arrays import Ints
from s4g_ray.config.schema import MiningConfig
from s4g_ray.data.tables.embedding_table import PartHead, read_heads
from s4g_ray.errors import RunError
from s4g_ray.mining.groups import places_per_part, plan_groups
from s4g_ray.mining.report import Counts
from s4g_ray.row_lookup import rows_of
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, Stamp, open_published

Row = dict[str, Any]  # the arguments of a task
OnBlock = Callable[[int], None]  # called with the number of queries that a block answers


@dataclass(frozen=True)
class MinedPart:
    """The outcome of a task: its counts, and a part of the graph or a file that others read.

    aside: a file beside the commits. starts[B + 1]: the first row in it of each block, and its
    number of rows.
    """

    counts: Counts = field(default_factory=Counts)
    part: Part | None = None
    aside: Part | None = None
    starts: tuple[int, ...] = ()

    @classmethod
    def from_row(cls, value: Row) -> MinedPart:
        """Read an outcome that was written as the JSON of asdict."""
        return cls(
            counts=Counts.from_json(value["counts"]),
            part=_read_part_entry(value["part"]),
            aside=_read_part_entry(value["aside"]),
            starts=tuple(value["starts"]),
        )


def _read_part_entry(value: Row | None) -> Part | None:
    return None if value is None else Part(**value)


@dataclass(frozen=True)
class MiningPlan:
    """The groups of a job."""

    parts: list[Part]  # of the queries' embeddings
    rows: list[Row]  # the arguments of each group's task
    places: Ints  # of the mined queries, ascending
    num_queries: int  # with an embedding
    num_missing: int  # queries without one

    @classmethod
    def from_embeddings(
        cls, embeddings: str, query_ids: Ints, cfg: MiningConfig, k: int, stamp: Stamp
    ) -> MiningPlan:
        """Plan the groups of the queries query_ids[Q] of a published embedding table.

        Raises RunError when the table is unpublished, not made from the stamp or not in the order
        of places, a query repeats, or more queries are missing than images were left out of it.
        """
        manifest = open_published(embeddings, "embeddings", stamp)
        parts = [part for part in manifest.parts if part.name.startswith("queries/")]
        is_found = np.zeros(len(query_ids), dtype=bool)
        places: list[Ints] = []
        for part, head in zip(parts, read_heads((embeddings, p) for p in parts), strict=True):
            _check_vectors(embeddings, part, head, stamp)
            rows = rows_of(query_ids, head.ids)
            mined = np.unique(head.place_ids[rows >= 0])
            _check_order(embeddings, part, places, mined)
            _mark_found(embeddings, query_ids, is_found, rows[rows >= 0])
            places.append(mined)
        num_bad_images = len(manifest.info.get("bad_images", ()))
        num_missing = _count_missing(embeddings, query_ids, is_found, num_bad_images)
        wanted = places_per_part(cfg.part_mb, k)
        groups = plan_groups([len(mined) for mined in places], wanted)
        return cls(
            parts=parts,
            rows=[describe_group(number, parts, group) for number, group in enumerate(groups)],
            places=np.concatenate(places),
            num_queries=len(query_ids) - num_missing,
            num_missing=num_missing,
        )


def describe_group(number: int, parts: Sequence[Part], group: Sequence[int]) -> Row:
    """Return the arguments of the task of a group of parts."""
    return {"number": number, "parts": json.dumps([asdict(parts[i]) for i in group])}


def parts_of(row: Row) -> list[Part]:
    """Return the parts that a task's arguments name."""
    return [Part(**part) for part in json.loads(row["parts"])]


def _check_vectors(embeddings: str, part: Part, head: PartHead, stamp: Stamp) -> None:
    """Raise RunError for vectors that are not those of the stamp."""
    if (head.dim, head.dtype) != (stamp.dim, stamp.dtype):
        raise RunError(
            f"{files.join(embeddings, part.name)} holds {head.dtype} vectors of D={head.dim},"
            f" but {stamp.dtype} of D={stamp.dim} are wanted; remove {embeddings} and resume"
        )


def _check_order(embeddings: str, part: Part, before: Sequence[Ints], places: Ints) -> None:
    """Raise RunError when a part holds a place that does not follow those of the parts before."""
    last = next((mined[-1] for mined in reversed(before) if len(mined)), None)
    if last is None or not len(places) or places[0] > last:
        return
    raise RunError(
        f"{files.join(embeddings, part.name)} holds place {places[0]}, a part before it place"
        f" {last}: the table is not in the order of places, as older versions wrote it; remove"
        f" {embeddings} and embed again"
    )


def _mark_found(
    embeddings: str, query_ids: Ints, is_found: np.ndarray[Any, Any], rows: Ints
) -> None:
    """Mark the rows of queries that a part holds. Raises RunError when one is marked already."""
    ordered = np.sort(rows)
    repeated = np.concatenate([rows[is_found[rows]], ordered[1:][ordered[1:] == ordered[:-1]]])
    if len(repeated):
        raise RunError(
            f"{embeddings} holds query id {query_ids[repeated[0]]} twice; remove it and resume"
        )
    is_found[rows] = True


def _count_missing(
    embeddings: str, query_ids: Ints, is_found: np.ndarray[Any, Any], num_bad_images: int
) -> int:
    """Count the queries without an embedding.

    Raises RunError when they are all queries, or more than images were left out.
    """
    num_missing = len(query_ids) - int(is_found.sum())
    if num_missing > num_bad_images or num_missing == len(query_ids):
        raise RunError(
            f"{num_missing} of {len(query_ids)} queries have no embedding in {embeddings} (bad"
            f" images left out there: {num_bad_images}); the first is query id"
            f" {query_ids[np.argmin(is_found)]}; remove {embeddings} and resume"
        )
    return num_missing
