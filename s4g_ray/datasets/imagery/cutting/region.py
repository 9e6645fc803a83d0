"""Cut a region: claim the target, cut all blocks, publish the data set and what describes it."""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely

from s4g_ray.data.dataset import GeoDataset, refuse_existing, write_dataset
from s4g_ray.data.schema import SCHEMAS, SPLITS
from s4g_ray.datasets.imagery.cutting.cell_blocks import Block, divide_cells
from s4g_ray.datasets.imagery.cutting.coverage import (
    Squares,
    draw_map,
    measure_km2,
    to_geojson,
    union_squares,
)
from s4g_ray.datasets.imagery.cutting.summary import KIND, Summary
from s4g_ray.datasets.imagery.cutting.tile_shards import (
    CutBlock,
    CutPlan,
    ReadTiles,
    cut_block,
    read_rows,
)
from s4g_ray.datasets.imagery.world_grid import GridCells, WorldGrid
from s4g_ray.datasets.packing.packed_tables import SHARDS
from s4g_ray.errors import InputError
from s4g_ray.progress import Update
from s4g_ray.storage import files
from s4g_ray.storage.manifest import publish
from s4g_ray.storage.part_commits import WORK, check_reached, claim_folder

MARKER = "_cutting.json"  # in the target until it is published: what is being cut there
BY = "s4g convert imagery"
MEANINGS = {
    "imagery": "imagery (SOURCE or --bands, or a file of it was rewritten)",
    "cells": "cells (--size-m, --overlap, --area or --bounds)",
}
VIEWS = {"references": "aerial image", "queries": "photo"}
LARGEST_TILE = 8192  # pixels
MOST_THREADS = 8  # without Ray: each holds some hundred megabytes of tiles and of their window


@dataclass(frozen=True)
class CutOptions:
    """How tiles are made. Raises InputError for values out of range."""

    pixels: int = 384  # side of a tile
    quality: int = 90  # of JPEG
    max_nodata: float = 0.05  # share of a tile
    split: str = "gallery"

    def __post_init__(self) -> None:
        if not 8 <= self.pixels <= LARGEST_TILE:
            raise InputError(f"--pixels {self.pixels} is not within 8..{LARGEST_TILE}")
        if not 1 <= self.quality <= 100:
            raise InputError(f"--quality {self.quality} is not within 1..100")
        if not 0 <= self.max_nodata < 1:
            raise InputError(f"--max-nodata {self.max_nodata:g} must be 0 or more, and below 1")
        if self.split not in SPLITS["references"]:
            allowed = ", ".join(SPLITS["references"])
            raise InputError(f"--split {self.split!r} is none of {allowed}")


@dataclass(frozen=True)
class TileSource:
    """Where tiles come from. read: picklable, cells into tiles."""

    read: ReadTiles
    identity: str  # equal for the same imagery, read in the same way
    stretch: str
    native_resolution_m: float
    footprint: Any  # shapely, lon and lat
    check_unchanged: Callable[[], None] = lambda: None  # raises InputError, before publishing


@dataclass(frozen=True)
class GridPart:
    """The cells of one grid that are to be cut."""

    grid: WorldGrid
    cells: GridCells


@dataclass
class _Coverage:
    """The squares of a size, kept and dropped, block by block."""

    kept: list[pa.Table]
    dropped: list[pa.Table]


def cut_region(
    target: str,
    source: TileSource,
    parts: Sequence[GridPart],
    options: CutOptions,
    *,
    name: str,
    num_tasks: int | None,
    on_progress: Update,
) -> GeoDataset:
    """Cut the cells of some grids into a data set of references, without queries.

    num_tasks: Ray tasks at a time, None: two a processor of the cluster; 0: by threads of this
    process, without Ray. Calling it again with the same arguments resumes an interrupted call.
    Raises InputError for a target that holds something else, and where no tile is left.
    """
    target = files.absolute(target)
    num_cells = sum(len(part.cells) for part in parts)
    plan = _claim_target(target, source, parts, options)
    blocks = _divide(parts, options.pixels)
    if num_tasks == 0:
        outcomes = _cut_here(plan, blocks, num_cells, on_progress)
    else:
        # imports Ray
        from s4g_ray.datasets.imagery.cutting.block_tasks import cut_as_tasks

        outcomes = cut_as_tasks(plan, blocks, num_cells, num_tasks, on_progress)
        check_reached(plan.work, [outcome.rows for outcome in outcomes])
    source.check_unchanged()
    _check_tiles(target, outcomes)
    summary = _describe_region(plan, source, options, outcomes, name)
    return _publish(plan, parts, outcomes, summary, name)


def _claim_target(
    target: str, source: TileSource, parts: Sequence[GridPart], options: CutOptions
) -> CutPlan:
    refuse_existing(target)
    grids = [[part.grid.size_m, part.grid.overlap] for part in parts]
    cells = files.fingerprint(*(part.cells.ids.tobytes() for part in parts))
    made_with = {
        "imagery": files.fingerprint(source.identity.encode()),
        "stretch": source.stretch,
        "grids": grids,
        "cells": cells,
        **asdict(options),
    }
    claim_folder(target, MARKER, made_with, BY, MEANINGS)
    key = files.fingerprint(json.dumps(made_with, sort_keys=True).encode())
    return CutPlan(source.read, target, key, options.split, options.quality, options.max_nodata)


def _divide(parts: Sequence[GridPart], pixels: int) -> Iterator[Block]:
    """Yield the blocks of all grids, numbered in one sequence."""
    number = 0
    for part in parts:
        for block in divide_cells(part.cells, part.grid, pixels, number):
            number = block.number + 1
            yield block


def _cut_here(
    plan: CutPlan, blocks: Iterator[Block], num_cells: int, on_progress: Update
) -> list[CutBlock]:
    """Cut blocks by threads: reading, resampling and encoding leave Python's lock free."""
    outcomes = []
    done = 0
    num_threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(num_threads, "cutter") as cutters:
        started = (cutters.submit(cut_block, plan, block) for block in blocks)
        waiting = deque(islice(started, num_threads))
        try:
            while waiting:
                outcome = waiting.popleft().result()
                waiting.extend(islice(started, 1))
                outcomes.append(outcome)
                done += outcome.num_cells
                on_progress(done, num_cells)
        finally:
            for call in waiting:
                call.cancel()
    return outcomes


def _check_tiles(target: str, outcomes: Sequence[CutBlock]) -> None:
    """Raise InputError when no tile was cut, with the reasons; leave the target empty again."""
    if any(outcome.shard for outcome in outcomes):
        return
    reasons: Counter[str] = Counter()
    for outcome in outcomes:
        reasons.update(outcome.dropped)
    found = "; ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    _remove_work(target)
    raise InputError(
        f"no tile is left of {sum(reasons.values()):,} cells: {found}; give another area, a smaller"
        " --size-m or a larger --max-nodata"
    )


def _describe_region(
    plan: CutPlan,
    source: TileSource,
    options: CutOptions,
    outcomes: Sequence[CutBlock],
    name: str,
) -> Summary:
    """Write coverage.geojson and coverage.png; return the counts."""
    kept: dict[float, Any] = {}
    counts: dict[float, int] = {}
    dropped = []
    for size_m, coverage in _collect_cells(plan, outcomes).items():
        tiles = pa.concat_tables(coverage.kept)
        counts[size_m] = len(tiles)
        kept[size_m] = union_squares(_squares_of(tiles, size_m))
        dropped.append(union_squares(_squares_of(pa.concat_tables(coverage.dropped), size_m)))
    kept = {size_m: kept[size_m] for size_m in kept if counts[size_m]}
    files.write_json(files.join(plan.target, "coverage.geojson"), to_geojson(kept, counts))
    ground = shapely.union_all(list(kept.values()))
    lost = shapely.difference(shapely.union_all(dropped), ground)
    picture = draw_map(kept, lost, source.footprint, counts, name)
    files.write_bytes(files.join(plan.target, "coverage.png"), picture)
    return Summary.from_blocks(
        outcomes,
        ground_km2=measure_km2(ground),
        pixels=options.pixels,
        stretch=source.stretch,
        native_resolution_m=source.native_resolution_m,
    )


def _collect_cells(plan: CutPlan, outcomes: Sequence[CutBlock]) -> dict[float, _Coverage]:
    by_size: dict[float, _Coverage] = {}
    for outcome in outcomes:
        cells = read_rows(plan.work, outcome).select(["lat", "lon", "reason"])
        is_kept = pc.is_null(cells["reason"])
        coverage = by_size.setdefault(outcome.size_m, _Coverage([], []))
        coverage.kept.append(cells.filter(is_kept))
        coverage.dropped.append(cells.filter(pc.invert(is_kept)))
    return by_size


def _squares_of(cells: pa.Table, size_m: float) -> Squares:
    return Squares(cells["lat"].to_numpy(), cells["lon"].to_numpy(), size_m)


def _publish(
    plan: CutPlan,
    parts: Sequence[GridPart],
    outcomes: Sequence[CutBlock],
    summary: Summary,
    name: str,
) -> GeoDataset:
    """Publish the shards, then the data set that refers to them."""
    _remove_leftovers(plan.shards)
    shards = [outcome.shard for outcome in outcomes if outcome.shard is not None]
    info = {"key": plan.key, "images": summary.tiles, "summary": summary.to_json()}
    publish(plan.shards, KIND, shards, info=info)
    grids = {part.grid.size_m: part.grid for part in parts}
    tables = (_make_references(plan, grids[outcome.size_m], outcome) for outcome in outcomes)
    references = chain(tables, [SCHEMAS["references"].empty_table()])
    queries = SCHEMAS["queries"].empty_table()
    dataset = write_dataset(plan.target, references, queries, name=name, views=VIEWS)
    _remove_work(plan.target)
    return dataset


def _make_references(plan: CutPlan, grid: WorldGrid, outcome: CutBlock) -> pa.Table:
    """Return the canonical columns of the tiles of a block."""
    cells = read_rows(plan.work, outcome)
    tiles = cells.filter(pc.is_null(cells["reason"]))
    rows, columns = grid.row_and_column(tiles["id"].to_numpy())
    numbers = zip(rows.tolist(), columns.tolist(), strict=True)
    shard = outcome.shard.name if outcome.shard else ""
    return pa.table(
        {
            "id": tiles["id"],
            "place_id": tiles["id"],
            "uri": pa.array([f"{SHARDS}/{shard}"] * len(tiles), pa.string()),
            "offset": tiles["offset"],
            "length": tiles["length"],
            "lat": tiles["lat"],
            "lon": tiles["lon"],
            "split": pa.array([plan.split] * len(tiles), pa.string()),
            "source_id": pa.array([f"{grid.size_m:g}m/{r}/{c}" for r, c in numbers], pa.string()),
            "size_m": np.full(len(tiles), grid.size_m, np.float32),
        }
    )


def _remove_leftovers(folder: str) -> None:
    """Remove files of writes that were cut off when a process was killed."""
    for name in files.list_names(folder):
        if name.startswith(".") and name.endswith(".tmp"):
            files.remove(files.join(folder, name))


def _remove_work(target: str) -> None:
    """Remove what only a resumed call needs, the claim last."""
    files.remove(files.join(target, WORK))
    files.remove(files.join(target, MARKER))
