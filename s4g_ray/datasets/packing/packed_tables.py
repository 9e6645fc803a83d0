"""Make the tables of a packed data set: rows whose image is a byte range of a shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s4g_ray.data.image_table import VIEWS, View
from s4g_ray.datasets.packing.layout import Plan
from s4g_ray.storage.manifest import Part

SHARDS = "shards"  # the folder of the shards, in the data set's folder


@dataclass(frozen=True)
class Skipped:
    """A row that was left out, and why."""

    view: View
    id: int
    reason: str


@dataclass(frozen=True)
class WrittenShard:
    """A shard that was written, and where its images are in it."""

    part: Part
    places: list[tuple[int, int] | str]  # of each image: offset and length, or why it is bad

    @property
    def is_whole(self) -> bool:
        """Whether no image was left out."""
        return not any(isinstance(place, str) for place in self.places)

    @classmethod
    def from_json(cls, value: Any) -> WrittenShard:
        """Make the shard from the plain types of a commit."""
        places = [
            place if isinstance(place, str) else (place[0], place[1]) for place in value["places"]
        ]
        return cls(Part(**value["part"]), places)


def make_packed_tables(
    tables: dict[View, pa.Table], plans: dict[View, Plan], written: Sequence[WrittenShard]
) -> tuple[dict[View, pa.Table], list[Skipped]]:
    """Return the rows of both views with the byte ranges of their images, and the rows left out.

    `written` holds the shards of all plans, in the order of VIEWS.
    """
    packed: dict[View, pa.Table] = {}
    skipped: list[Skipped] = []
    remaining = iter(written)
    for view in VIEWS:
        of_view = [next(remaining) for _ in plans[view].shards]
        packed[view], bad = _fill_byte_ranges(tables[view], view, plans[view], of_view)
        skipped += bad
    packed["queries"], unmatched = _with_train_reference(packed["queries"], packed["references"])
    return packed, skipped + unmatched


def _fill_byte_ranges(
    table: pa.Table, view: View, plan: Plan, written: Sequence[WrittenShard]
) -> tuple[pa.Table, list[Skipped]]:
    """Return the rows with the byte ranges of their images, and those left out for a bad image."""
    ids = table["id"].to_pylist()
    names = [f"{SHARDS}/{shard.part.name}" for shard in written]
    is_good = np.zeros(len(ids), np.bool_)
    skipped = []
    uris = []
    offsets = []
    lengths = []
    for row, (shard, number) in enumerate(zip(plan.shard_of, plan.number_of, strict=True)):
        place = written[shard].places[number]
        if isinstance(place, str):
            skipped.append(Skipped(view, ids[row], place))
            continue
        is_good[row] = True
        uris.append(names[shard])
        offsets.append(place[0])
        lengths.append(place[1])
    columns = {
        "uri": pa.array(uris, pa.string()),
        "offset": pa.array(offsets, pa.int64()),
        "length": pa.array(lengths, pa.int64()),
    }
    table = table.filter(pa.array(is_good))
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, column)
    return table, skipped


def _with_train_reference(
    queries: pa.Table, references: pa.Table
) -> tuple[pa.Table, list[Skipped]]:
    """Return the queries without train queries whose place has no train reference, and those."""
    train = references.filter(pc.field("split") == "train")["place_id"].combine_chunks()
    is_held_out = pc.not_equal(queries["split"], "train")
    kept = pc.or_(is_held_out, pc.is_in(queries["place_id"], value_set=train))
    lost = queries.filter(pc.invert(kept))["id"].to_pylist()
    reason = "no train reference of its place could be packed"
    return queries.filter(kept), [Skipped("queries", id_, f"id {id_}: {reason}") for id_ in lost]
