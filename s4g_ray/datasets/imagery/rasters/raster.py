"""Read rasters by GDAL: GeoTIFF, COG, VRT, JPEG 2000 and others, local or in an object store.

Object stores are read in ranges by GDAL itself (/vsis3/, /vsigs/, /vsiaz/). It takes credentials,
profile and region from the same environment variables and files as storage/ does; the endpoint and
the number of attempts are handed over here.
"""

from __future__ import annotations

import itertools
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numba
import numpy as np
import pyproj
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError, RasterioIOError
from rasterio.windows import Window

from s4g_ray.datasets.imagery.rasters.georeference import Georeference
from s4g_ray.errors import InputError, first_line
from s4g_ray.storage import files
from s4g_ray.storage.s3_settings import RetryPolicy, find_endpoint

NUM_OPEN = 32  # files that a thread keeps open
CACHE_MB = 64  # of GDAL, in each process
ALL_VALID: NDArray[np.uint8] = np.empty((0, 0), np.uint8)
_SCHEMES = {"s3": "/vsis3/", "s3a": "/vsis3/", "gs": "/vsigs/", "az": "/vsiaz/"}
_open_files = threading.local()


class Piece(NamedTuple):
    """Pixels of a window: values[h, w, C], and valid[h, w], or [0, 0] where all hold data."""

    values: NDArray[Any]
    valid: NDArray[np.uint8]


@dataclass(frozen=True)
class Raster:
    """A raster that GDAL reads. Small and picklable: each thread opens the file for itself."""

    uri: str
    georeference: Georeference
    bands: tuple[tuple[str, int], ...]  # uri and number (from 1) of each band that is read
    dtype: str
    nodata: tuple[float | None, ...]  # of each of the bands
    alphas: tuple[tuple[str, int], ...]  # uri and number of bands that tell where data is
    masks: tuple[str, ...]  # files whose masks beside the bands tell it
    palette: bytes | None = None  # red, green, blue of 256 values
    highest: int = 255  # of bytes: less where the file stores fewer bits
    # than those that are read, beside alpha; not of the identity
    has_other_bands: bool = field(default=False, repr=False)

    def choose_factor(self, scale: float) -> int:
        """Return the whole number of pixels that reading may average, for tiles of scale pixels."""
        return max(1, int(scale + 0.05))

    def read(self, column: int, row: int, width: int, height: int, factor: int) -> Piece:
        """Read a window that lies within the raster, averaged over factor * factor pixels.

        GDAL takes it from an overview where the file has a fitting one. Pixels without data do not
        count. Raises InputError for a file that is damaged.
        """
        shape = (-(-height // factor), -(-width // factor))
        window = Window(column, row, width, height)
        parts = []
        valid = ALL_VALID
        for uri, group in itertools.groupby(self.bands, lambda band: band[0]):
            part = self._read_file(uri, [number for _, number in group], window, shape)
            parts.append(part.values)
            valid = _merge(valid, part.valid)
        values = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
        valid = _merge(valid, _find_valid(values, self.nodata))
        if self.palette:
            table = np.frombuffer(self.palette, np.uint8).reshape(256, 3)
            values = table[values[..., 0]]
        return Piece(values, valid)

    def _read_file(
        self, uri: str, numbers: list[int], window: Window, shape: tuple[int, int]
    ) -> Piece:
        """Read bands of a file, and where its alpha band and its mask say that data is."""
        alpha = dict(self.alphas).get(uri)
        chosen = numbers if alpha is None else [*numbers, alpha]
        is_plain = shape == (window.height, window.width) or self.palette
        method = Resampling.nearest if is_plain else Resampling.average
        bands = np.empty((len(chosen), *shape), self.dtype)
        valid = ALL_VALID
        with reading(uri) as source:
            source.read(chosen, window=window, out=bands, resampling=method)
            if uri in self.masks:
                mask = source.read_masks(
                    chosen[0], window=window, out_shape=shape, resampling=method
                )
                valid = (mask >= 128).astype(np.uint8)
        if alpha is not None:
            full = np.iinfo(bands.dtype).max if bands.dtype.kind in "iu" else 1
            valid = _merge(valid, (bands[-1] > full / 2).astype(np.uint8))
            bands = bands[:-1]
        return Piece(_interleave(bands), valid)

    def list_files(self) -> list[str]:
        """Return the files that pixels come from: those that a VRT names too."""
        return _list_files(list(dict.fromkeys(uri for uri, _ in self.bands)))

    def describe(self) -> dict[str, Any]:
        """Return what is known of the raster, for people and JSON."""
        return {
            "uri": self.uri,
            "width": self.georeference.width,
            "height": self.georeference.height,
            "crs": pyproj.CRS.from_user_input(self.georeference.crs).name,
            "resolution_m": self.georeference.resolution_m,
            "bands": [number for _, number in self.bands],
            "dtype": self.dtype,
            "nodata": list(self.nodata),
        }


def _interleave(bands: NDArray[Any]) -> NDArray[Any]:
    """Return values[h, w, C] of bands[C, h, w].

    GDAL writes to values[h, w, 3] in 2.1 ns a pixel more than to bands, this takes 0.7 ns.
    """
    num_bands, height, width = bands.shape
    if num_bands != 3:
        return np.ascontiguousarray(bands.transpose(1, 2, 0))
    values = np.empty((height, width, 3), bands.dtype)
    _interleave_three(bands.reshape(3, -1), values.reshape(-1))
    return values


@numba.njit(cache=True, nogil=True)
def _interleave_three(bands: NDArray[Any], values: NDArray[Any]) -> None:
    red = bands[0]
    green = bands[1]
    blue = bands[2]
    for i in range(len(red)):
        values[3 * i] = red[i]
        values[3 * i + 1] = green[i]
        values[3 * i + 2] = blue[i]


def _find_valid(values: NDArray[Any], nodata: Sequence[float | None]) -> NDArray[np.uint8]:
    """Return 1 where a band holds a value, and all are numbers; [0, 0] where that is everywhere."""
    valid = None
    if any(value is not None for value in nodata):
        valid = np.zeros(values.shape[:2], bool)
        for band, value in enumerate(nodata):
            found = values[..., band]
            if value is None:
                valid[:] = True
            elif not np.isnan(value):
                valid |= found != np.asarray(value).astype(values.dtype)
            else:
                valid |= ~np.isnan(found)
    if values.dtype.kind == "f":
        numbers = np.isfinite(values).all(axis=2)
        valid = numbers if valid is None else valid & numbers
    if valid is None or valid.all():
        return ALL_VALID
    return valid.astype(np.uint8)


def _merge(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if not len(one):
        return other
    return one & other if len(other) else one


def open_raster(
    uri: str, *, bands: Sequence[int] | None = None, nodata: float | None = None
) -> Raster:
    """Return the raster of a file, after reading its header.

    bands: one or three, from 1; None: those of red, green and blue, or the first three, or the
    first one. nodata: the value of pixels without data, in place of the file's own. Raises
    InputError for a file that cannot be read, has no place on the Earth, or lacks the bands.
    """
    with reading(uri) as source:
        georeference = _read_georeference(uri, source)
        chosen = _choose_bands(uri, source, bands)
        if len({source.dtypes[band - 1] for band in chosen}) > 1:
            raise InputError(f"{uri}: bands {chosen} hold values of different types")
        dtype = source.dtypes[chosen[0] - 1]
        if np.dtype(dtype).kind not in "iuf":
            raise InputError(f"{uri}: values of type {dtype} cannot be shown; give other bands")
        flags = source.mask_flag_enums[chosen[0] - 1]
        alpha = [i + 1 for i, kind in enumerate(source.colorinterp) if kind is ColorInterp.alpha]
        own = nodata is None
        palette = _read_palette(source, chosen)
        return Raster(
            uri,
            georeference,
            tuple((uri, band) for band in chosen),
            dtype,
            tuple(source.nodatavals[band - 1] if own else nodata for band in chosen),
            ((uri, alpha[0]),) if alpha and own and alpha[0] not in chosen else (),
            (uri,)
            if MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags and own
            else (),
            palette,
            255 if palette else _read_highest(source, chosen),
            has_other_bands=source.count - len(alpha) > len(chosen),
        )


def _read_georeference(uri: str, source: Any) -> Georeference:
    transform = source.transform
    if source.gcps[0] and transform.is_identity:
        raise InputError(
            f"{uri} is placed by ground control points only; write a copy with `gdalwarp`"
        )
    crs = source.crs
    if crs is None:
        raise InputError(
            f"{uri} has no georeference: no coordinate reference system; write one with"
            " `gdal_edit.py -a_srs EPSG:... FILE`, or convert its original"
        )
    if transform.is_identity or transform.is_degenerate:
        raise InputError(f"{uri} has no georeference: nothing places its pixels in {crs}")
    georeference = Georeference(crs.to_wkt(), tuple(transform)[:6], source.width, source.height)
    try:
        is_geocentric = pyproj.CRS.from_user_input(georeference.crs).is_geocentric
        has_border = is_geocentric or len(georeference.border) > 3
    except pyproj.exceptions.ProjError as error:
        raise InputError(
            f"{uri}: unknown coordinate reference system ({first_line(error)}); write a copy in a"
            " known one with `gdalwarp -t_srs EPSG:...`"
        ) from error
    if is_geocentric:
        raise InputError(
            f"{uri}: its coordinate reference system {crs} counts metres from the centre of the"
            " Earth, which places no pixels on the ground; give the image the system of its"
            " pixels with `gdal_edit.py -a_srs EPSG:... FILE`, or convert its original"
        )
    if not has_border:
        raise InputError(f"{uri}: no pixel of it lies on the Earth, by its reference system")
    return georeference


def _choose_bands(uri: str, source: Any, bands: Sequence[int] | None) -> list[int]:
    if bands is not None:
        chosen = list(bands)
        absent = [band for band in chosen if not 1 <= band <= source.count]
        if absent:
            raise InputError(
                f"{uri} has no band {', '.join(map(str, absent))}; it has bands 1 to {source.count}"
            )
        if len(chosen) not in (1, 3):
            raise InputError(f"bands {chosen}: give one, or three for red, green and blue")
        return chosen
    kinds = list(source.colorinterp)
    colors = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
    if all(color in kinds for color in colors):
        return [kinds.index(color) + 1 for color in colors]
    shown = [i + 1 for i, kind in enumerate(kinds) if kind is not ColorInterp.alpha]
    return shown[:3] if len(shown) >= 3 else shown[:1]


def _read_palette(source: Any, bands: Sequence[int]) -> bytes | None:
    """Return the colors of a raster of one band of bytes that has a palette."""
    kind = source.colorinterp[bands[0] - 1]
    if len(bands) > 1 or kind is not ColorInterp.palette or source.dtypes[bands[0] - 1] != "uint8":
        return None
    table = np.zeros((256, 3), np.uint8)
    for value, color in source.colormap(bands[0]).items():
        table[value] = color[:3]
    return table.tobytes()


def _read_highest(source: Any, bands: Sequence[int]) -> int:
    """Return the largest value of bands of bytes of which a file stores fewer than 8 bits."""
    tags = [source.tags(band, ns="IMAGE_STRUCTURE") for band in bands]
    return (1 << max(int(tag.get("NBITS", 8)) for tag in tags)) - 1


@contextmanager
def reading(uri: str) -> Iterator[Any]:
    """Open a raster, or take the one that this thread has open. Raises InputError.

    Keeps NUM_OPEN files open in each thread: a dataset of GDAL must not be shared by two.
    """
    if getattr(_open_files, "pid", None) != os.getpid():
        _open_files.pid = os.getpid()
        _open_files.found = OrderedDict()
    found: OrderedDict[str, Any] = _open_files.found
    try:
        with rasterio.Env(**_options(uri)):
            if uri not in found:
                with warnings.catch_warnings():  # open_raster refuses those
                    warnings.simplefilter("ignore", NotGeoreferencedWarning)
                    found[uri] = rasterio.open(_gdal_path(uri))
            found.move_to_end(uri)
            if len(found) > NUM_OPEN:
                found.popitem(last=False)[1].close()
            yield found[uri]
    except (RasterioError, RasterioIOError) as error:
        found.pop(uri, None)
        # rasterio's own error of a read says no more than that it failed
        reason = first_line(error.__cause__ or error).removeprefix(f"{uri}: ")
        raise InputError(f"{uri} cannot be read as a raster: {reason}") from error


def close_files() -> None:
    """Close the files that this thread has open, because they have changed or are to be removed."""
    found = getattr(_open_files, "found", {})
    while found:
        found.popitem()[1].close()


def _list_files(uris: list[str]) -> list[str]:
    """Return files, and those that the VRTs among them name, at any depth."""
    found: dict[str, None] = {}
    while uris:
        uri = uris.pop()
        found[uri] = None
        if uri.lower().endswith(".vrt"):
            with reading(uri) as source:
                names = [_uri_of(name) for name in source.files]
            # but statistics, which viewers write
            uris += [name for name in names if name not in found and not name.endswith(".aux.xml")]
    return list(found)


def _uri_of(path: str) -> str:
    for scheme, prefix in (("s3", "/vsis3/"), ("gs", "/vsigs/"), ("az", "/vsiaz/")):
        if path.startswith(prefix):
            return f"{scheme}://{path.removeprefix(prefix)}"
    return path


def _gdal_path(uri: str) -> str:
    scheme, separator, path = uri.partition("://")
    return f"{_SCHEMES[scheme]}{path}" if separator and scheme in _SCHEMES else uri


def _options(uri: str) -> dict[str, Any]:
    """Return the settings of GDAL for a file."""
    options: dict[str, Any] = {"GDAL_CACHEMAX": CACHE_MB}
    if files.is_local(uri):
        return options
    policy = RetryPolicy.read()
    options.update(
        GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR",
        GDAL_HTTP_MAX_RETRY=policy.max_attempts - 1,
        GDAL_HTTP_CONNECTTIMEOUT=int(policy.timeout_s),
        GDAL_HTTP_LOW_SPEED_TIME=int(policy.timeout_s),
        GDAL_HTTP_LOW_SPEED_LIMIT=1,
        GDAL_HTTP_MERGE_CONSECUTIVE_RANGES="YES",
    )
    endpoint = find_endpoint()
    if endpoint:
        address = urlsplit(endpoint)
        options.update(
            AWS_S3_ENDPOINT=f"{address.netloc}{address.path.rstrip('/')}",
            AWS_HTTPS="YES" if address.scheme == "https" else "NO",
            AWS_VIRTUAL_HOSTING="FALSE",
        )
    return options
