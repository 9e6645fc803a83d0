"""Hold the id and the coordinates of each row of an index, and find rows by id or area."""

from __future__ import annotations

from typing import Self

import numpy as np

from s4g_ray.arrays import Bools, Floats64, Ints, Rows32
from s4g_ray.data.area import Area
from s4g_ray.index.stores.dense import append_rows, keep_rows
from s4g_ray.index.vector_checks import whole_ids
from s4g_ray.row_lookup import rows_of

AREA_BLOCK = 2**20  # rows whose coordinates are compared with an area at once
GONE = -1  # the id of a row that was removed, where the vectors keep it


class RowTable:
    """ids[N], GONE for rows that were removed, and coordinates[N, 2] (lat, lon in degrees).

    coordinates None: the index has none.
    """

    def __init__(self, ids: Ints, coordinates: Floats64 | None = None) -> None:
        self.ids = ids
        self.coordinates = coordinates
        self._num_gone = int((ids == GONE).sum())
        self._order: Rows32 | None = None  # of ids, where they do not ascend
        self._sorted: Ints | None = None  # ids in ascending order

    @classmethod
    def empty(cls) -> Self:
        """Make a table without rows."""
        return cls(np.empty(0, np.int64))

    def __len__(self) -> int:
        """Return the number of ids; rows that are gone do not count."""
        return len(self.ids) - self._num_gone

    def check_coordinates(self, coordinates: Floats64 | None, count: int) -> Floats64 | None:
        """Return the coordinates of `count` new rows as float64.

        Raises ValueError for another shape, for latitudes out of range, and where only some rows of
        the table would have coordinates.
        """
        is_new = not len(self.ids) and self.coordinates is None
        if not is_new and (coordinates is None) != (self.coordinates is None):
            has = "no coordinates" if self.coordinates is None else "coordinates"
            raise ValueError(f"the vectors of this index have {has}; add others alike")
        if coordinates is None:
            return None
        values = np.asarray(coordinates, np.float64)
        if values.shape != (count, 2):
            raise ValueError(
                f"coordinates{list(values.shape)} are not lat and lon of each of {count} vectors"
            )
        if (np.abs(values[:, 0]) > 90).any():
            raise ValueError("latitudes must lie within -90..90 degrees; give lat, then lon")
        return values

    def append(self, ids: Ints, coordinates: Floats64 | None) -> None:
        """Append rows that check_coordinates has passed."""
        if coordinates is not None:
            if self.coordinates is None:
                self.coordinates = np.empty((0, 2))
            self.coordinates = append_rows(self.coordinates, coordinates)
        self.ids = append_rows(self.ids, ids)
        self._forget_order()

    def keep(self, rows: Bools) -> None:
        """Drop the rows that are False, and number the others anew, in order."""
        self.ids = keep_rows(self.ids, rows)
        if self.coordinates is not None:
            self.coordinates = keep_rows(self.coordinates, rows)
        self._num_gone = int((self.ids == GONE).sum())
        self._forget_order()

    def mark_gone(self, rows: Ints) -> None:
        """Give rows no id any more."""
        ids = self.ids if self.ids.flags.writeable else self.ids.copy()
        ids[rows] = GONE
        self.ids = ids
        self._num_gone += len(rows)
        self._forget_order()

    def find_repeated(self) -> Ints:
        """Return the ids that stand in more than one row, ascending; keeps no memory."""
        if _ascends(self.ids):
            return np.empty(0, np.int64)
        ordered = np.sort(self.ids)
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        return np.unique(repeated[repeated != GONE])

    def rows_of(self, ids: Ints) -> Ints:
        """Return the row of each id, -1 for ids that no row has."""
        ordered, order = self._ascending()
        places = rows_of(ordered, ids)
        if order is not None:
            places = np.where(places >= 0, order[places].astype(np.int64), -1)
        return np.where(ids == GONE, -1, places)

    def all_rows_of(self, ids: Ints) -> Ints:
        """Return all rows, ascending, that have one of the ids, each once, ascending."""
        return np.flatnonzero((rows_of(ids, self.ids) >= 0) & (self.ids != GONE))

    def select(self, ids: Ints | None, area: Area | None) -> Ints | None:
        """Return the rows, ascending, that have one of the ids and lie in the area; None: all rows.

        Raises ValueError for ids that are no whole numbers or do not ascend, and for an area
        without coordinates.
        """
        if ids is None and area is None and not self._num_gone:
            return None
        if ids is None:
            rows = np.flatnonzero(self.ids != GONE)
        else:
            ids = whole_ids(ids)
            if not _ascends(ids):
                raise ValueError("ids to search among must ascend, each once: use numpy.unique")
            rows = self.rows_of(ids)
            rows = np.sort(rows[rows >= 0])
        if area is None:
            return rows
        if self.coordinates is None:
            raise ValueError(
                "this index has no coordinates to search an area by; give them when it is built"
            )
        found = [rows[:0]]
        for start in range(0, len(rows), AREA_BLOCK):
            block = rows[start : start + AREA_BLOCK]
            lat, lon = self.coordinates[block].T
            found.append(block[area.contains(lat, lon)])
        return np.concatenate(found)

    def _ascending(self) -> tuple[Ints, Rows32 | None]:
        """Return the ids in ascending order, and the row of each; None where rows ascend too.

        Keeps 12 bytes a row for it, until rows change.
        """
        if self._sorted is None:
            if _ascends(self.ids):
                self._sorted = self.ids
            else:
                order = np.argsort(self.ids, kind="stable")
                self._sorted = self.ids[order]
                self._order = order.astype(np.int32)
        return self._sorted, self._order

    def _forget_order(self) -> None:
        self._order = None
        self._sorted = None


def _ascends(ids: Ints) -> bool:
    return bool((ids[1:] > ids[:-1]).all())
