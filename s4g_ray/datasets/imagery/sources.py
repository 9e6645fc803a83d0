"""Open imagery: files, folders, lists of them, STAC item collections and tile pyramids."""

from __future__ import annotations

import s4g_ray.datasets.imagery.libraries  # noqa: F401 - first: it names the extra

# isort: split
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from s4g_ray.datasets.imagery.imagery import Imagery, Source
from s4g_ray.datasets.imagery.rasters.raster import open_raster
from s4g_ray.datasets.imagery.rasters.stac import choose_assets, open_item, read_items
from s4g_ray.datasets.imagery.rasters.tile_pyramids import open_pyramid
from s4g_ray.datasets.imagery.rasters.tile_stores import is_tile_folder
from s4g_ray.errors import InputError
from s4g_ray.storage import files

RASTER_ENDS = (".tif", ".tiff", ".vrt", ".jp2", ".img")
PYRAMID_ENDS = (".mbtiles", ".pmtiles")
STAC_ENDS = (".json", ".geojson")
MAX_DEPTH = 4  # folders within a folder of imagery
NUM_OPENED = 8  # at a time: object stores answer slowly
Opener = Callable[[], Source]


def open_imagery(
    source: str | Sequence[str],
    *,
    bands: Sequence[int] | None = None,
    nodata: float | None = None,
    assets: Sequence[str] | None = None,
) -> Imagery:
    """Return the imagery of a source, or of several: the first one counts where they overlap.

    source: a raster that GDAL reads (GeoTIFF, COG, VRT, JPEG 2000, ...), a folder of rasters (by
    name, those in folders after those beside them), a pattern such as `ortho/*.tif`, a STAC item
    collection or item (.json), MBTiles, PMTiles, a folder Z/X/Y.png of web mercator tiles. Local,
    s3:// (gs://, az://; but MBTiles) or package://. Reference systems may differ.
    bands: one or three, from 1. None: red, green and blue where a file tells which those are, else
    the first three, else the first one. nodata: replaces what the files say. assets: keys of the
    assets of STAC items. Raises InputError: for a file that cannot be read, has no georeference or
    lacks the bands, and for a folder without imagery.
    """
    uris = [source] if isinstance(source, str) else list(source)
    openers: list[Opener] = []
    for uri in uris:
        openers += _find_openers(uri, bands, nodata, assets)
    if not openers:
        raise InputError("no imagery is given")
    with ThreadPoolExecutor(min(NUM_OPENED, len(openers))) as pool:
        return Imagery(tuple(pool.map(lambda opener: opener(), openers)))


def _find_openers(
    uri: str,
    bands: Sequence[int] | None,
    nodata: float | None,
    assets: Sequence[str] | None,
) -> list[Opener]:
    """Return what opens each raster of a source."""
    path = files.resolve_package(files.absolute(uri))
    if files.is_local(path) and not Path(path).exists():
        paths = sorted(map(str, Path("/").glob(path.lstrip("/"))))
        if not paths:
            raise InputError(f"{path} does not exist")
        found = [_find_openers(name, bands, nodata, assets) for name in paths]
        return [opener for part in found for opener in part]
    end = path.lower()
    if end.endswith(STAC_ENDS):
        chosen = [choose_assets(path, item, assets) for item in read_items(path)]
        return [partial(open_item, item, bands=bands, nodata=nodata) for item in chosen]
    if end.endswith(PYRAMID_ENDS):
        return [partial(open_pyramid, path, bands=bands, nodata=nodata)]
    if end.endswith(RASTER_ENDS) or (files.is_local(path) and Path(path).is_file()):
        return [partial(open_raster, path, bands=bands, nodata=nodata)]
    names = files.list_names(path)
    if is_tile_folder(path, names):
        return [partial(open_pyramid, path, bands=bands, nodata=nodata)]
    rasters = _list_rasters(path, names, MAX_DEPTH)
    if rasters:
        return [partial(open_raster, name, bands=bands, nodata=nodata) for name in rasters]
    if not names and not files.is_local(path):  # an object without a known end
        return [partial(open_raster, path, bands=bands, nodata=nodata)]
    raise InputError(
        f"{path} holds no imagery: no {', '.join(RASTER_ENDS)} file and no folders Z/X/Y of tiles;"
        f" it holds {', '.join(names[:5]) or 'nothing'}"
    )


def _list_rasters(folder: str, names: Sequence[str], depth: int) -> list[str]:
    found = [files.join(folder, name) for name in names if name.lower().endswith(RASTER_ENDS)]
    for name in names:
        inner = files.join(folder, name)
        is_folder = Path(inner).is_dir() if files.is_local(inner) else "." not in name
        if not depth or not is_folder or name.startswith("."):
            continue
        found += _list_rasters(inner, files.list_names(inner), depth - 1)
    return found
