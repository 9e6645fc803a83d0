"""Plan a mining job: its groups of queries, its merges, and the outcome of each task. No Ray.

A *group* is a run of consecutive parts of the queries' embeddings. A place whose queries are in
several groups is *shared*: the groups write their candidates for it aside, and a merge task for a
range of shared places reads them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from s4g_ray.arrays import Ints
from s4g_ray.config.schema import MiningConfig
from s4g_ray.data.tables.embedding_table import read_heads
from s4g_ray.errors import RunError
from s4g_ray.mining.groups import count_groups, cut_ranges, plan_groups
from s4g_ray.mining.overlap import sample_places
from s4g_ray.mining.report import Counts
from s4g_ray.row_lookup import rows_of
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, Stamp, open_published

Row = dict[str, Any]  # the arguments of a task, or its results


@dataclass(frozen=True)
class MinedPart:
    """The outcome of a task: its counts, a part of the graph, and candidates of shared places.

    low, high: the first and last place of the candidates.
    """

    counts: Counts
    part: Part | None
    candidates: Part | None = None
    low: int = 0
    high: int = 0

    @classmethod
    def from_row(cls, value: Row) -> MinedPart:
        """Read an outcome that was written as the JSON of asdict."""
        return cls(
            counts=Counts.from_json(value["counts"]),
            part=_read_part_entry(value["part"]),
            candidates=_read_part_entry(value["candidates"]),
            low=value["low"],
            high=value["high"],
        )


def _read_part_entry(value: Row | None) -> Part | None:
    return None if value is None else Part(**value)


@dataclass(frozen=True)
class MiningPlan:
    """The groups of a job."""

    parts: list[Part]  # of the queries' embeddings
    rows: list[Row]  # the arguments of each group's task
    sample: Ints  # places that are looked up in the previous graph
    shared: Ints  # places of several groups, ascending
    num_groups: Ints  # of each shared place
    num_missing: int  # queries without an embedding

    @classmethod
    def from_embeddings(
        cls, embeddings: str, query_ids: Ints, cfg: MiningConfig, stamp: Stamp
    ) -> MiningPlan:
        """Plan the groups of the queries query_ids[Q] of a published embedding table.

        Raises RunError when the table is unpublished or not made from the stamp, a query repeats,
        or more queries are missing than images were left out of the table.
        """
        manifest = open_published(embeddings, "embeddings", stamp)
        parts = [part for part in manifest.parts if part.name.startswith("queries/")]
        num_bad_images = len(manifest.info.get("bad_images", ()))
        ids, places = _read_query_columns(embeddings, parts, query_ids, stamp)
        num_missing = _count_missing(embeddings, query_ids, ids, num_bad_images)
        groups = plan_groups([len(ids_of_part) for ids_of_part in ids], cfg.part_queries)
        places_of_groups = [np.concatenate([places[i] for i in group]) for group in groups]
        all_places, num_groups = count_groups(places_of_groups)
        is_shared = num_groups > 1
        rows: list[Row] = []
        for number, group in enumerate(groups):
            group_parts = [asdict(parts[i]) for i in group]
            rows.append({"number": number, "parts": json.dumps(group_parts)})
        return cls(
            parts=parts,
            rows=rows,
            sample=sample_places(all_places),
            shared=all_places[is_shared],
            num_groups=num_groups[is_shared],
            num_missing=num_missing,
        )

    def plan_merges(self, outcomes: Sequence[MinedPart], part_queries: int) -> list[Row]:
        """Return the arguments of a merge task for each range of shared places.

        Each names the files of candidates that may hold places of its range. `part_queries` bounds
        the rows of a range.
        """
        rows: list[Row] = []
        ranges = cut_ranges(self.shared, self.num_groups, part_queries)
        for number, (low, high) in enumerate(ranges, start=len(self.rows)):
            candidates = [
                outcome.candidates
                for outcome in outcomes
                if outcome.candidates and outcome.low <= high and outcome.high >= low
            ]
            candidates.sort(key=lambda part: part.name)
            parts = [asdict(part) for part in candidates]
            rows.append({"number": number, "low": low, "high": high, "parts": json.dumps(parts)})
        return rows


def _read_query_columns(
    embeddings: str, parts: Sequence[Part], query_ids: Ints, stamp: Stamp
) -> tuple[list[Ints], list[Ints]]:
    """Read ids and places of the queries that are mined, one array for each part.

    Raises RunError for vectors that are not those of the stamp.
    """
    ids: list[Ints] = []
    places: list[Ints] = []
    heads = read_heads((embeddings, part) for part in parts)
    for part, head in zip(parts, heads, strict=True):
        if (head.dim, head.dtype) != (stamp.dim, stamp.dtype):
            raise RunError(
                f"{files.join(embeddings, part.name)} holds {head.dtype} vectors of D={head.dim},"
                f" but {stamp.dtype} of D={stamp.dim} are wanted; remove {embeddings} and resume"
            )
        is_mined = rows_of(query_ids, head.ids) >= 0
        ids.append(head.ids[is_mined])
        places.append(head.place_ids[is_mined])
    return ids, places


def _count_missing(
    embeddings: str, query_ids: Ints, ids: Sequence[Ints], num_bad_images: int
) -> int:
    """Count the queries without an embedding.

    Raises RunError when they are all queries, or more than images were left out, or when a query
    repeats.
    """
    found = np.sort(np.concatenate([np.zeros(0, np.int64), *ids]))
    repeated = found[1:][found[1:] == found[:-1]]
    if len(repeated):
        raise RunError(f"{embeddings} holds query id {repeated[0]} twice; remove it and resume")
    missing = query_ids[rows_of(found, query_ids) < 0]
    if len(missing) > num_bad_images or not len(found):
        raise RunError(
            f"{len(missing)} of {len(query_ids)} queries have no embedding in {embeddings}, from"
            f" which {num_bad_images} images were left out; the first is query id {missing[0]};"
            f" remove {embeddings} and resume"
        )
    return len(missing)
