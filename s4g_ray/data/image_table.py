"""ImageTable: where the images of some rows lie."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from s4g_ray.arrays import Floats64, Ints

View = Literal["references", "queries"]
VIEWS: tuple[View, View] = ("references", "queries")


@dataclass(frozen=True)
class ImageTable:
    """Where the images of some rows lie, in row order: arrays of N, coordinates and headings NaN where null."""

    ids: Ints
    place_ids: Ints
    uris: list[str]  # absolute, or s3://
    offsets: list[int | None]
    lengths: list[int | None]
    lat: Floats64
    lon: Floats64
    headings: Floats64  # degrees; NaN for references
    regions: list[str | None]

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def _order(self) -> Ints:
        return np.argsort(self.ids, kind="stable")

    def rows(self, ids: Ints) -> Ints:
        """Row numbers of ids[M]. Raises KeyError for an id that is not in the table."""
        position = np.searchsorted(self.ids, ids, sorter=self._order)
        rows = self._order[np.minimum(position, len(self) - 1)]
        if len(ids) and not np.array_equal(self.ids[rows], ids):
            raise KeyError(int(np.asarray(ids)[self.ids[rows] != ids][0]))
        return rows

    def take(self, index: Ints) -> ImageTable:
        """The table of some rows, by number."""
        return ImageTable(
            self.ids[index],
            self.place_ids[index],
            [self.uris[i] for i in index],
            [self.offsets[i] for i in index],
            [self.lengths[i] for i in index],
            self.lat[index],
            self.lon[index],
            self.headings[index],
            [self.regions[i] for i in index],
        )
