"""Define the rows that a converter makes: one by one, or a view at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from s4g_ray.arrays import Bools, Ints
from s4g_ray.data.image_table import View
from s4g_ray.data.pixels.image_values import AS_STORED, ImageValues
from s4g_ray.data.schema import SCHEMAS
from s4g_ray.data.tables.view_columns import SPLIT_CODES


@dataclass(frozen=True, kw_only=True)
class Row:
    """One image of a data set, with the columns of both tables. Degrees are WGS84."""

    id: int
    place_id: int
    uri: str
    split: str
    lat: float | None = None
    lon: float | None = None
    region: str | None = None
    source_id: str | None = None
    heading_deg: float | None = None
    semi_positives: list[int] | None = None


@dataclass(frozen=True)
class ViewRows:
    """The rows of a view to write: place_ids[N], splits[N] as in SPLIT_CODES, and their tables.

    make_tables takes kept[N], which rows to write, and yields tables of them in their order.
    values: how their images become bytes.
    """

    place_ids: Ints
    splits: NDArray[np.uint8]
    make_tables: Callable[[Bools], Iterator[pa.Table]]
    values: ImageValues = AS_STORED

    @classmethod
    def from_list(cls, rows: Sequence[Row], view: View) -> ViewRows:
        """Take rows that are in a list."""

        def make_tables(kept: Bools) -> Iterator[pa.Table]:
            chosen = [vars(rows[number]) for number in np.flatnonzero(kept).tolist()]
            yield pa.Table.from_pylist(chosen, schema=SCHEMAS[view])

        place_ids = np.array([row.place_id for row in rows], dtype=np.int64)
        splits = np.array([SPLIT_CODES[row.split] for row in rows], dtype=np.uint8)
        return cls(place_ids, splits, make_tables)


def split_paths(paths: pa.ChunkedArray) -> tuple[pa.DictionaryArray, pa.ChunkedArray]:
    """Split paths into folders, "" where there is none, and names."""
    folders = []
    names = []
    for chunk in paths.chunks:
        parts = pc.split_pattern(chunk, "/", max_splits=1, reverse=True)
        texts = parts.flatten().cast(pa.large_string())
        ends = np.cumsum(pc.list_value_length(parts).to_numpy())
        has_folder = pc.equal(pc.list_value_length(parts), 2)
        names.append(texts.take(pa.array(ends - 1)))
        before = texts.take(pa.array(np.maximum(ends - 2, 0)))
        folders.append(pc.if_else(has_folder, before, "").dictionary_encode())
    unified = pa.chunked_array(folders, folders[0].type).unify_dictionaries().combine_chunks()
    return unified, pa.chunked_array(names, pa.large_string())
