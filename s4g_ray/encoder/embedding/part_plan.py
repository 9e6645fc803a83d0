"""Divide the rows of a view into the parts of an embedding table, and the parts into blocks.

A table is in the order of its places, and no place lies in two parts, so that jobs that read it
part by part never share a place. Plain arrays: 10^7 rows are planned in seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from s4g_ray.arrays import Ints, Rows32
from s4g_ray.data.image_table import View
from s4g_ray.storage import files

ID_BYTES = 16  # of id and place_id, beside the embedding of a row
BLOCK_BATCHES = 8  # batches of a block: an actor's share of work, and what a death costs


@dataclass(frozen=True)
class Block:
    """Rows of a part that an actor encodes at a time, in the order of the part."""

    view: View
    part: int  # number of its part in the view
    number: int  # in its part
    rows: Rows32  # of the view's image table
    digest: str  # of the ids and place ids of these rows: those that the driver has seen

    @property
    def name(self) -> str:
        """Return the block's file name, without its suffix."""
        return f"{self.view}/part-{self.part:05d}/block-{self.number:05d}"


@dataclass(frozen=True)
class PlannedPart:
    """A part of a table, as the blocks that it is made of."""

    view: View
    number: int
    blocks: tuple[Block, ...]

    @property
    def name(self) -> str:
        """Return the file name of the part within its table."""
        return f"{self.view}/part-{self.number:05d}.parquet"

    @property
    def rows(self) -> Rows32:
        """Return the rows of the view's image table, in the order of the part."""
        return np.concatenate([block.rows for block in self.blocks])

    @property
    def num_images(self) -> int:
        """Return the number of rows, of which some may have no readable image."""
        return sum(len(block.rows) for block in self.blocks)


def rows_of_part(part_mb: float, dim: int, dtype: str) -> int:
    """Return how many rows of D=dim values make a part of at least part_mb megabytes."""
    row_bytes = dim * np.dtype(dtype).itemsize + ID_BYTES
    return max(1, int(np.ceil(part_mb * 1e6 / row_bytes)))


def plan_parts(
    view: View,
    ids: Ints,
    place_ids: Ints,
    rows: Ints | None = None,
    *,
    part_rows: int,
    batch_size: int,
) -> list[PlannedPart]:
    """Plan the parts of a view: ids[N] and place_ids[N] of its image table, sorted by id.

    rows[M]: the rows to embed, ascending; all of them if None. Parts are in the order of place_id,
    then id. A part has part_rows rows, and the others of its last place; the last part may have
    fewer. A block has about BLOCK_BATCHES batches.
    """
    places = place_ids if rows is None else place_ids[rows]
    if (places[1:] < places[:-1]).any():
        order = np.argsort(places, kind="stable")
        places = places[order]
        chosen = order if rows is None else rows[order]
    else:
        chosen = np.arange(len(places)) if rows is None else rows
    numbers: Rows32 = chosen.astype(np.int32)
    parts: list[PlannedPart] = []
    start = 0
    while start < len(numbers):
        last = min(start + part_rows, len(numbers)) - 1
        stop = int(np.searchsorted(places, places[last], side="right"))
        part = numbers[start:stop]
        blocks = _cut_blocks(view, len(parts), part, ids, place_ids, batch_size)
        parts.append(PlannedPart(view, len(parts), tuple(blocks)))
        start = stop
    return parts


def _cut_blocks(
    view: View, part: int, rows: Rows32, ids: Ints, place_ids: Ints, batch_size: int
) -> Iterator[Block]:
    """Cut a part's rows into blocks of whole batches, as many in each; the last may be short."""
    num_batches = -(-len(rows) // batch_size)
    num_blocks = max(1, round(num_batches / BLOCK_BATCHES))
    for number in range(num_blocks):
        first = num_batches * number // num_blocks * batch_size
        stop = num_batches * (number + 1) // num_blocks * batch_size
        own = rows[first:stop]
        yield Block(view, part, number, own, digest_rows(ids[own], place_ids[own]))


def digest_rows(ids: Ints, place_ids: Ints) -> str:
    """Return a fingerprint of the ids[n] and place_ids[n] of a block."""
    return files.fingerprint(ids.tobytes(), place_ids.tobytes())[:16]
