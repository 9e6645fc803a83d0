"""Convert imagery: cut the cells of a world grid out of it, into a data set of references."""

from __future__ import annotations

import s4g_ray.datasets.imagery.libraries  # noqa: F401 - first: it names the extra

# isort: split
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

from s4g_ray.amounts import count_noun
from s4g_ray.data.area import Area
from s4g_ray.data.dataset import GeoDataset, refuse_existing
from s4g_ray.data.pixels.stretch import Stretch
from s4g_ray.datasets.imagery.cutting.region import CutOptions, GridPart, TileSource, cut_region
from s4g_ray.datasets.imagery.imagery import Imagery, choose_stretch, find_cells
from s4g_ray.datasets.imagery.sources import open_imagery
from s4g_ray.datasets.imagery.tile_reader import Dropped, Tile, read_tiles
from s4g_ray.datasets.imagery.world_grid import (
    Bounds,
    GridCells,
    WorldGrid,
    check_grids,
    split_blocks,
)
from s4g_ray.errors import InputError
from s4g_ray.progress import Report, Update, ignore, ignore_report
from s4g_ray.storage import files

TILES_BYTES = 64e6  # of tiles that are in memory at once: 4 bytes a pixel
MAX_SIDE = 16  # cells
FEW_PIXELS = (
    1e9  # of tiles: 10 to 25 s of processor time, over all threads; starting Ray takes 10 s
)


@dataclass(frozen=True)
class ImageryReader:
    """Reads cells as tiles, some at a time. Picklable."""

    imagery: Imagery
    stretch: Stretch
    pixels: int
    grids: Mapping[float, WorldGrid]  # by size_m

    def __call__(self, cells: GridCells) -> Iterator[Tile | Dropped]:
        """Yield the tiles of cells of one grid, or the reason why there is none."""
        side = max(1, min(MAX_SIDE, int((TILES_BYTES / (4 * self.pixels**2)) ** 0.5)))
        for block in split_blocks(self.grids[cells.size_m], cells, side):
            yield from read_tiles(self.imagery, block, pixels=self.pixels, stretch=self.stretch)


def convert(
    source: str | Sequence[str],
    target: str,
    *,
    size_m: float | Sequence[float],
    overlap: float = 0.0,
    pixels: int = 384,
    bands: Sequence[int] | None = None,
    area: Area | None = None,
    bounds: Bounds | None = None,
    stretch: Stretch | None = None,
    max_nodata: float = 0.05,
    split: str = "gallery",
    quality: int = 90,
    name: str | None = None,
    num_tasks: int | None = None,
    report: Report = ignore_report,
    on_progress: Update = ignore,
) -> GeoDataset:
    """Cut tiles of equal ground size out of imagery -> a data set of references, no queries.

    source: as open_imagery takes it; where sources overlap, the first one with data counts. size_m:
    one or several sides of tiles, metres of ground; neighbors lie size_m * (1 - overlap) apart.
    pixels: side of a tile. bands: from 1. area, bounds (west, south, east, north): only cells whose
    centres lie there. stretch: None for bytes as they are, and percentiles 2 and 98 of other types.
    A tile with more than max_nodata of its pixels without data is dropped. quality: of JPEG.

    Ids and place_ids are those of the cells, the same in every run. The tiles are in tar shards;
    `summary.read_summary` reads what was cut and dropped; coverage.png and coverage.geojson show
    the ground. The bytes do not depend on num_tasks: Ray tasks at a time, 0 for none and no Ray;
    None: two a processor of the cluster, none for few tiles. The same call again resumes.

    Raises InputError for the errors of open_imagery, for options out of range, for an area that
    meets no imagery, where no tile is left, and for a target that holds something else.
    """
    options = CutOptions(pixels, quality, max_nodata, split)
    refuse_existing(files.absolute(target))
    sizes = _read_sizes(size_m)
    grids = {size: WorldGrid(size, overlap) for size in sizes}
    check_grids(list(grids.values()))
    imagery = open_imagery(source, bands=bands)
    parts = [GridPart(grid, find_cells(imagery, grid, area, bounds)) for grid in grids.values()]
    chosen = choose_stretch(imagery, stretch)
    _note_bands(imagery, bands, report)
    _note_resolution(imagery, sizes, pixels, report)
    if num_tasks is None and sum(len(part.cells) for part in parts) * pixels**2 <= FEW_PIXELS:
        num_tasks = 0
    tiles = TileSource(
        read=ImageryReader(imagery, chosen, pixels, grids),
        identity=imagery.identity,
        stretch=chosen.describe(),
        native_resolution_m=imagery.native_resolution_m,
        footprint=imagery.footprint,
        check_unchanged=partial(_check_unchanged, imagery, imagery.identity, target),
    )
    name = name or _name_of(imagery)
    return cut_region(
        target, tiles, parts, options, name=name, num_tasks=num_tasks, on_progress=on_progress
    )


def _check_unchanged(imagery: Imagery, identity: str, target: str) -> None:
    """Raise InputError when files of the imagery have changed since its identity was looked up."""
    if imagery.identity != identity:
        raise InputError(
            f"files of the imagery were changed or removed while {target} was cut from them; remove"
            f" {target}, then run the same command again"
        )


def _read_sizes(size_m: float | Sequence[float]) -> list[float]:
    """Return the sizes. Raises InputError unless they are one or several different ones."""
    sizes = [float(size_m)] if isinstance(size_m, int | float) else [float(one) for one in size_m]
    if not sizes or len(set(sizes)) < len(sizes):
        named = ", ".join(f"{size:g}" for size in sizes)
        raise InputError(f"--size-m {named}: give one or several different sizes")
    return sizes


def _note_bands(imagery: Imagery, asked: Sequence[int] | None, report: Report) -> None:
    """Report the bands that are shown where none are named; those of one file a color are known."""
    if asked is not None:
        return
    counts: Counter[tuple[int, ...]] = Counter()
    has_others = False
    for source in imagery.sources:
        bands = tuple(source.describe()["bands"])
        if len(set(bands)) == len(bands):
            counts[bands] += 1
            has_others = has_others or source.has_other_bands
    if not counts:
        return
    texts = {bands: ",".join(map(str, bands)) for bands in counts}
    if len(counts) > 1:
        texts = {
            bands: f"{text} of {count_noun(counts[bands], 'raster')}"
            for bands, text in texts.items()
        }
    hint = " (--bands names others)" if has_others else ""
    report(f"bands shown: {'; '.join(texts.values())}{hint}")


def _note_resolution(imagery: Imagery, sizes: Sequence[float], pixels: int, report: Report) -> None:
    """Report sizes whose tiles have finer pixels than the imagery."""
    native = imagery.native_resolution_m
    for size in sizes:
        if size < native:
            report(f"tiles of {size:g} m are smaller than a pixel of the imagery ({native:.3g} m)")
        elif size / pixels < 0.9 * native:
            factor = native * pixels / size
            report(
                f"tiles of {size:g} m at {pixels} pixels show {size / pixels:.3g} m a pixel, the"
                f" imagery {native:.3g} m: enlarged {factor:.3g} times; --pixels"
                f" {max(8, round(size / native))} holds all that there is"
            )


def _name_of(imagery: Imagery) -> str:
    return PurePosixPath(imagery.sources[0].uri).stem or "region"
