"""Define columns, views, splits and protocols of the canonical data set.

A data set is a folder of dataset.json, references/part-*.parquet and queries/part-*.parquet.
Opening it casts nothing: each of these columns must be there, with exactly this type. Only those of
OPTIONAL may be missing: they are then read as null. Writing casts what it is given
(format/columns.py).
"""

from __future__ import annotations

import re
from typing import Literal

import pyarrow as pa

from s4g_ray.data.image_table import View
from s4g_ray.storage import files

ProtocolName = Literal["strict", "paper"]

SPLITS = {"references": ("train", "val", "test", "gallery"), "queries": ("train", "val", "test")}
ROWS_PER_PART = 1_000_000
_COMMON = [
    pa.field("id", pa.int64(), nullable=False),
    pa.field("place_id", pa.int64(), nullable=False),
    pa.field("uri", pa.string(), nullable=False),
    pa.field("offset", pa.int64()),
    pa.field("length", pa.int64()),
    pa.field("lat", pa.float64()),
    pa.field("lon", pa.float64()),
    pa.field("split", pa.string(), nullable=False),
    pa.field("region", pa.string()),
    pa.field("source_id", pa.string()),
]
SCHEMAS = {
    "references": pa.schema(_COMMON),
    "queries": pa.schema(
        [
            *_COMMON,
            pa.field("heading_deg", pa.float32()),
            pa.field("semi_positives", pa.list_(pa.int64())),
        ]
    ),
}
OPTIONAL = {
    "references": pa.schema([pa.field("size_m", pa.float32())]),  # side of the ground of a tile
    "queries": pa.schema([]),
}


def with_optional(schema: pa.Schema, view: View) -> pa.Schema:
    """Return the schema of a part with the optional columns that it lacks."""
    for field in OPTIONAL[view]:
        if field.name not in schema.names:
            schema = schema.append(field)
    return schema


def gallery_splits(split: str) -> list[str]:
    """Return the splits of references in which the queries of a split are searched."""
    return [split, "gallery"]


def name_part(number: int) -> str:
    """Return the file name of a part that write_dataset makes."""
    return f"part-{number:05d}.parquet"


def list_part_names(folder: str) -> list[str]:
    """List the names of the Parquet parts in a folder, without the user's other files."""
    return [name for name in files.list_names(folder) if re.fullmatch(r"part-.*\.parquet", name)]
