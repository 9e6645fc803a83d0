"""Open imagery: files, folders, lists of them, STAC item collections and tile pyramids."""

from __future__ import annotations

from collections.abc import Sequence

from s4g_ray.datasets.imagery.imagery import Imagery
from s4g_ray.datasets.imagery.rasters import open_raster
from s4g_ray.errors import InputError
from s4g_ray.storage import files


def open_imagery(
    source: str | Sequence[str],
    *,
    bands: Sequence[int] | None = None,
    nodata: float | None = None,
) -> Imagery:
    """Return the imagery of a source, or of several: the first one counts where they overlap."""
    uris = [source] if isinstance(source, str) else list(source)
    if not uris:
        raise InputError("no imagery is given")
    return Imagery(
        tuple(
            open_raster(files.resolve_package(files.absolute(uri)), bands=bands, nodata=nodata)
            for uri in uris
        )
    )
