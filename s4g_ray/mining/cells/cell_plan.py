"""Plan mining within cells: blocks of cells, and the rows of the table that each block needs.

A *block* is a run of consecutive cells, mined by one task into one part of the graph. It needs the
queries of its cells, the references of its cells and of those that adjoin them, and a few
references of anywhere. Pure functions: no Ray, no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Ints, Rows32
from s4g_ray.config.schema import MiningConfig
from s4g_ray.data.places import Places
from s4g_ray.errors import InputError
from s4g_ray.mining.candidates import References
from s4g_ray.mining.cells.geographic_cells import GeoCells
from s4g_ray.mining.groups import places_per_part

MAX_REFERENCES = 2**18  # of the cells of a block, in a task's memory: 0.5 GB in float16 at D=1024


@dataclass(frozen=True)
class CellPlan:
    """Blocks of cells, and who needs what.

    place_ids[P], ascending: the places that are in cells. first_cells[B + 1]: the first cell of
    each block, and the number of cells. taker_starts[C + 1], takers: blocks that need the
    references of each cell, ascending. far_rows[F], ascending: rows of references that the blocks
    far_blocks[F] need too.
    """

    cells: GeoCells
    place_ids: Ints
    first_cells: Ints
    taker_starts: Ints
    takers: Rows32
    far_rows: Ints
    far_blocks: Rows32

    @classmethod
    def from_places(
        cls,
        places: Places,
        mined: Ints,
        references: References,
        cfg: MiningConfig,
        k: int,
        seed: tuple[int, ...],
    ) -> CellPlan:
        """Plan for places, of which those of mined[M], ascending, have queries.

        seed: of the choice of far references. Raises InputError when a mined place or that of a
        reference has no coordinates.
        """
        is_located = np.isfinite(places.lat) & np.isfinite(places.lon)
        places = Places(places.ids[is_located], places.lat[is_located], places.lon[is_located])
        _check_located(places, mined, references.places)
        cells = GeoCells.from_places(places, cfg.cell_places)
        count = len(cells)
        num_mined = np.bincount(cells.cell_of[places.rows(mined)], minlength=count)
        indexed = cells.cell_of[places.rows(references.places)]
        num_references = np.bincount(indexed, minlength=count)
        first_cells = _cut_blocks(num_mined, num_references, places_per_part(cfg.part_mb, k))
        taker_starts, takers = _find_takers(cells, first_cells)
        far = [
            _draw_rows(len(references), cfg.far_references, (*seed, block))
            for block in range(len(first_cells) - 1)
        ]
        blocks = np.repeat(np.arange(len(far), dtype=np.int32), [len(rows) for rows in far])
        far_rows = np.concatenate(far)
        order = np.argsort(far_rows, kind="stable")
        return cls(
            cells, places.ids, first_cells, taker_starts, takers, far_rows[order], blocks[order]
        )

    @property
    def num_blocks(self) -> int:
        """The number of blocks."""
        return len(self.first_cells) - 1

    def cells_in(self, block: int) -> Ints:
        """Return the cells of a block."""
        return np.arange(self.first_cells[block], self.first_cells[block + 1])

    def far_rows_of(self, block: int) -> Ints:
        """Return the rows of the references of anywhere that a block needs, ascending."""
        return np.asarray(self.far_rows[self.far_blocks == block])

    def cells_of(self, place_ids: Ints) -> Ints:
        """Return the cell of each place[n]; all of them are in cells."""
        rows = np.searchsorted(self.place_ids, place_ids)
        return self.cells.cell_of[rows].astype(np.int64)

    def blocks_of_queries(self, place_ids: Ints) -> Ints:
        """Return the block that mines each place[n]."""
        cells = self.cells_of(place_ids)
        return np.asarray(np.searchsorted(self.first_cells, cells, side="right") - 1)

    def blocks_of_references(self, rows: Ints, place_ids: Ints) -> tuple[Ints, Ints]:
        """Return which blocks need references: rows[n] among all, of place_ids[n].

        Returns at[m], positions among the n, and blocks[m].
        """
        cells = self.cells_of(place_ids)
        near, near_positions = _expand(self.taker_starts[cells], self.taker_starts[cells + 1])
        far, far_positions = _expand(
            np.searchsorted(self.far_rows, rows),
            np.searchsorted(self.far_rows, rows, side="right"),
        )
        near_blocks = self.takers[near_positions].astype(np.int64)
        far_blocks = self.far_blocks[far_positions].astype(np.int64)
        taken = near * self.num_blocks + near_blocks  # ascending
        is_new = ~np.isin(far * self.num_blocks + far_blocks, taken)
        at = np.concatenate([near, far[is_new]])
        return at, np.concatenate([near_blocks, far_blocks[is_new]])


def _check_located(places: Places, *wanted: Ints) -> None:
    """Raise InputError where one of the wanted places is not among those with coordinates."""
    for ids in wanted:
        lost = ids[places.rows(ids) < 0]
        if len(lost):
            raise InputError(
                f"mining.scope=cells needs the coordinates of all places, but {len(lost)} have none"
                f" (place {lost[0]} first); add them, or set mining.scope=global"
            )


def _cut_blocks(num_mined: Ints, num_references: Ints, wanted: int) -> Ints:
    """Return the first cell of each block, and the number of cells.

    A block ends when it has `wanted` mined places, or MAX_REFERENCES.
    """
    first_cells = [0]
    mined = 0
    held = 0
    for cell, (places, references) in enumerate(
        zip(num_mined.tolist(), num_references.tolist(), strict=True)
    ):
        mined += places
        held += references
        if mined >= wanted or held >= MAX_REFERENCES or cell + 1 == len(num_mined):
            first_cells.append(cell + 1)
            mined = 0
            held = 0
    return np.array(first_cells)


def _find_takers(cells: GeoCells, first_cells: Ints) -> tuple[Ints, Rows32]:
    """Return starts[C + 1] and takers: the blocks that need each cell's references, ascending."""
    num_blocks = len(first_cells) - 1
    pairs = []  # cell and block as one number
    for block in range(num_blocks):
        own = np.arange(first_cells[block], first_cells[block + 1])
        pairs.append(cells.around(own) * num_blocks + block)
    ordered = np.sort(np.concatenate(pairs))
    starts = np.searchsorted(ordered, np.arange(len(cells) + 1) * num_blocks)
    return starts, (ordered % num_blocks).astype(np.int32)


def _draw_rows(count: int, size: int, seed: Sequence[int]) -> Ints:
    """Draw about `size` of `count` rows, each once, ascending; all of them when they are fewer."""
    if size >= count:
        return np.arange(count)
    return np.unique(np.random.default_rng(seed).integers(0, count, size))


def _expand(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> tuple[Ints, Ints]:
    """Return all positions of ranges starts[n]..ends[n], and for each the number of its range.

    The numbers come first.
    """
    counts = ends - starts
    numbers = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(numbers)) - np.repeat(np.cumsum(counts) - counts, counts)
    return numbers, starts[numbers] + within
