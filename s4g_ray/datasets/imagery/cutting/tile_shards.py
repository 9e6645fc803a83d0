"""Cut a block of cells into a tar shard, and commit the rows of its cells."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg

from s4g_ray.datasets.imagery.cutting.cell_blocks import Block
from s4g_ray.datasets.imagery.tile_reader import Dropped, Tile
from s4g_ray.datasets.imagery.world_grid import GridCells
from s4g_ray.datasets.packing.packed_tables import SHARDS
from s4g_ray.datasets.packing.tar_shards import new_object, verify
from s4g_ray.errors import RunError, StoreError
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, open_part, read_part, write_part
from s4g_ray.storage.parquet import refuse_extension_types
from s4g_ray.storage.part_commits import WORK, read_commit, write_commit
from s4g_ray.storage.tar_writer import TarWriter

SUBSAMPLING = "420"  # of colors in JPEG
ReadTiles = Callable[[GridCells], Iterable[Tile | Dropped]]
# of each cell of a block: the byte range of its tile, or the reason why there is none
ROWS = pa.schema(
    [
        pa.field("id", pa.int64()),
        pa.field("lat", pa.float64()),
        pa.field("lon", pa.float64()),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("reason", pa.string()),
    ]
)


@dataclass(frozen=True)
class CutPlan:
    """The values that all tasks share. key: of everything that determines the bytes of shards."""

    read: ReadTiles
    target: str
    key: str
    split: str
    quality: int  # of JPEG
    max_nodata: float  # share of a tile

    @property
    def shards(self) -> str:
        """The folder of the shards."""
        return files.join(self.target, SHARDS)

    @property
    def work(self) -> str:
        """The folder of commits and of rows, which is removed at the end."""
        return files.join(self.target, WORK)


@dataclass(frozen=True)
class CutBlock:
    """The outcome of a block. shard: None where no tile was cut."""

    size_m: float
    shard: Part | None
    rows: Part  # in the work folder
    num_cells: int
    dropped: dict[str, int]  # cells by reason
    is_reused: bool = False

    @classmethod
    def from_json(cls, value: Any) -> CutBlock:
        """Make the outcome from the plain types of a commit."""
        shard = Part(**value["shard"]) if value["shard"] else None
        rows = Part(**value["rows"])
        return cls(value["size_m"], shard, rows, value["num_cells"], value["dropped"], True)


def cut_block(plan: CutPlan, block: Block) -> CutBlock:
    """Return the outcome that was committed with the same key; or cut the block and commit it.

    Reads the shard back after writing it. Raises RunError for a store that fails, and the errors of
    reading the imagery.
    """
    commit = files.join(plan.work, f"block-{block.number:05d}.json")
    found = read_commit(
        commit, plan.key, CutBlock.from_json, lambda outcome: [(plan.work, outcome.rows)]
    )
    # an earlier version may have divided the cells otherwise
    is_same_block = found is not None and found.num_cells == len(block.cells)
    if found is not None and is_same_block and _has_shard(plan.shards, found.shard):
        return found
    name = f"references-{plan.split}-{block.number:05d}.tar"
    uri = files.join(plan.shards, name)
    results = iter(plan.read(block.cells))
    dropped: dict[int, str] = {}
    first = _next_tile(plan, results, dropped)
    shard = None
    places: dict[int, tuple[int, int]] = {}
    if first is not None:
        with new_object(uri) as file:
            tar = TarWriter(file)
            tile: Tile | None = first
            while tile is not None:
                member = tar.add(f"references/{tile.id:09d}.jpg", _encode(tile, plan.quality))
                places[tile.id] = (member.offset, member.length)
                tile = _next_tile(plan, results, dropped)
            sha256 = tar.close()
        verify(uri, tar.num_bytes, sha256, tar.members)
        shard = Part(name, len(tar.members), tar.num_bytes, sha256)
    rows = _write_rows(plan, block, places, dropped)
    size_m = float(block.cells.size_m)
    outcome = CutBlock(size_m, shard, rows, len(block.cells), dict(Counter(dropped.values())))
    write_commit(commit, plan.key, outcome)
    return outcome


def _next_tile(
    plan: CutPlan, results: Iterator[Tile | Dropped], dropped: dict[int, str]
) -> Tile | None:
    """Return the next tile that is kept, None at the end; note the reasons of those dropped."""
    for result in results:
        if isinstance(result, Dropped):
            dropped[result.id] = result.reason
        elif result.nodata_share > plan.max_nodata:
            dropped[result.id] = f"more than {plan.max_nodata:.3g} without data"
        else:
            return result
    return None


def _encode(tile: Tile, quality: int) -> bytes:
    pixels = np.ascontiguousarray(tile.pixels)
    encoded: bytes = simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling=SUBSAMPLING)
    return encoded


def _write_rows(
    plan: CutPlan, block: Block, places: dict[int, tuple[int, int]], dropped: dict[int, str]
) -> Part:
    """Write a row for each cell. Raises RunError for a cell that the reader left out."""
    ids = block.cells.ids.tolist()
    lost = [id_ for id_ in ids if id_ not in places and id_ not in dropped]
    if lost or len(places) + len(dropped) != len(ids):
        raise RunError(f"block {block.number}: the reader gave no result for cells {lost[:10]}")
    nothing = (None, None)
    table = pa.table(
        {
            "id": ids,
            "lat": block.cells.lat,
            "lon": block.cells.lon,
            "offset": pa.array([places.get(id_, nothing)[0] for id_ in ids], pa.int64()),
            "length": pa.array([places.get(id_, nothing)[1] for id_ in ids], pa.int64()),
            "reason": pa.array([dropped.get(id_) for id_ in ids], pa.string()),
        },
        schema=ROWS,
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return write_part(plan.work, f"rows-{block.number:05d}.parquet", buffer.getvalue(), len(ids))


def read_rows(work: str, outcome: CutBlock) -> pa.Table:
    """Read the rows of a block: columns of ROWS. Raises RunError when they are lost or altered."""
    table = pq.read_table(io.BytesIO(read_part(work, outcome.rows)))
    return refuse_extension_types(table, files.join(work, outcome.rows.name))


def _has_shard(folder: str, shard: Part | None) -> bool:
    """Return whether a shard is there in its length; also for a block without a shard."""
    try:
        if shard is not None:
            open_part(folder, shard).close()
    except StoreError:
        raise
    except RunError:  # removed or truncated
        return False
    return True
