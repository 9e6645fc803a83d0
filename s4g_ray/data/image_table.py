"""Define ImageTable: the images of the chosen rows of a data set, and where they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from s4g_ray.arrays import Floats32, Floats64, Ints, Rows32
from s4g_ray.data.pixels.image_values import AS_STORED, ImageValues
from s4g_ray.data.tables.text_column import TextColumn

View = Literal["references", "queries"]
VIEWS: tuple[View, View] = ("references", "queries")
_CHECKED_AT_ONCE = 1_000_000  # ids: the check for their order needs a byte for each


@dataclass(frozen=True)
class ImageTable:
    """Images of N rows, in row order: where each is stored, and its place.

    Each field holds N values, in memory or mapped from files (tables/mapped_table.py). Coordinates
    headings and sizes are NaN where the data set has null.
    """

    ids: Ints
    place_ids: Ints
    uris: TextColumn  # absolute, or s3://
    offsets: Ints | Rows32  # bytes; -1: the image is the whole file
    lengths: Ints | Rows32  # bytes; -1: the image is the whole file
    lat: Floats64
    lon: Floats64
    headings: Floats32  # degrees; NaN for references
    sizes: Floats32  # metres, the side of a tile's ground; NaN for queries
    regions: TextColumn  # "" where the data set has null
    values: ImageValues = AS_STORED  # how the values of the images become bytes

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def _order(self) -> Ints | None:
        """Return the rows in the order of their ids; None where they are in it already."""
        for start in range(0, len(self), _CHECKED_AT_ONCE):
            ids = self.ids[start : start + _CHECKED_AT_ONCE + 1]
            if (ids[1:] < ids[:-1]).any():
                return np.argsort(self.ids, kind="stable")
        return None

    def rows(self, ids: Ints) -> Ints:
        """Return the row numbers of ids[M]. Raises KeyError for an id that is not in the table."""
        if not len(ids):
            return np.zeros(0, dtype=np.int64)
        if not len(self):
            raise KeyError(int(ids[0]))
        positions = np.searchsorted(self.ids, ids, sorter=self._order)
        rows = np.minimum(positions, len(self) - 1)
        if self._order is not None:
            rows = self._order[rows]
        is_unknown = self.ids[rows] != ids
        if is_unknown.any():
            raise KeyError(int(np.asarray(ids)[is_unknown][0]))
        return rows

    def take(self, rows: Ints | slice) -> ImageTable:
        """Return the table of the given row numbers, in their order.

        For a slice, its arrays are views, and it holds the paths of its own rows alone.
        """
        return ImageTable(
            self.ids[rows],
            self.place_ids[rows],
            self.uris.take(rows),
            self.offsets[rows],
            self.lengths[rows],
            self.lat[rows],
            self.lon[rows],
            self.headings[rows],
            self.sizes[rows],
            self.regions.take(rows),
            self.values,
        )
