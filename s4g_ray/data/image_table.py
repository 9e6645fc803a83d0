"""Define ImageTable: the images of the chosen rows of a data set, and where they are stored."""

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
    """Images of N rows, in row order: where each is stored, and its place.

    Each field holds N values. Coordinates and headings are NaN where the data set has null.
    """

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
        """Return the row numbers of ids[M]. Raises KeyError for an id that is not in the table."""
        positions = np.searchsorted(self.ids, ids, sorter=self._order)
        rows = self._order[np.minimum(positions, len(self) - 1)]
        if len(ids) and not np.array_equal(self.ids[rows], ids):
            unknown = np.asarray(ids)[self.ids[rows] != ids]
            raise KeyError(int(unknown[0]))
        return rows

    def take(self, rows: Ints) -> ImageTable:
        """Return the table of the given row numbers, in their order."""
        return ImageTable(
            self.ids[rows],
            self.place_ids[rows],
            [self.uris[row] for row in rows],
            [self.offsets[row] for row in rows],
            [self.lengths[row] for row in rows],
            self.lat[rows],
            self.lon[rows],
            self.headings[rows],
            [self.regions[row] for row in rows],
        )
