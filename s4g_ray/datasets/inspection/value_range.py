"""Find the range of values of a data set's images, and write it into its dataset.json."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from s4g_ray.arrays import Ints
from s4g_ray.config.data_schema import ImageOptions
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.data.format.header import DatasetHeader
from s4g_ray.data.images import MAX_PIXELS, list_formats
from s4g_ray.data.pixels.image_values import ImageValues, UnfitValuesError
from s4g_ray.data.pixels.raw_values import (
    TIFF_STARTS,
    RawValues,
    describe_content,
    has_more_values,
    is_single_band,
    read_bands,
    read_single_band,
)
from s4g_ray.datasets.inspection.findings import Finding
from s4g_ray.datasets.inspection.image_checks import choose_sample
from s4g_ray.datasets.inspection.inventory import Inventory
from s4g_ray.errors import InputError
from s4g_ray.progress import Report, ignore_report
from s4g_ray.storage import files

if TYPE_CHECKING:  # numba takes a second to import
    from s4g_ray.data.pixels.stretch import Stretch

VALUES_AT_MOST = 1 << 16  # of an image and band, spread over it


def write_stretch(
    uri: str,
    stretch: Stretch,
    bands: tuple[int, ...] | None = None,
    report: Report = ignore_report,
) -> GeoDataset:
    """Write how images become bytes into dataset.json; return the data set as it is now.

    bands: None keeps those that are stored. Percentiles are found in a sample of the images whose
    values are not bytes; each band has its own limits. The data set's fingerprint changes with what
    is shown. report: gets a line where the sample holds bytes alone, which no stretch changes.
    Raises InputError for the errors of open_dataset, for images that cannot be read, for
    a sample without such values, and for images of the sample that do not fit.
    """
    uri = files.absolute(uri)
    bands = bands or DatasetHeader.read(uri).values.bands
    dataset = open_dataset(uri, ImageOptions(None, "full", bands))
    sample = list(_read_sample(dataset))
    for name, found in sample:
        try:
            dataset.values.choose(found.values)
        except UnfitValuesError as error:  # it lacks bands, or has more than are shown
            raise InputError(f"{name}: {error}") from error
    has_others = any(found.values.dtype != np.uint8 for _, found in sample)
    if not has_others and stretch.percentiles is None:
        report(
            "the images that were looked at hold bytes alone, which stay as they are: the stretch"
            " changes none of them"
        )
    if stretch.percentiles is not None:
        stretch = _find_limits(uri, stretch, dataset.values, [found for _, found in sample])
    values = ImageValues(stretch.describe(), bands).check()
    for name, found in sample:
        try:
            values.to_bytes(*found)
        except UnfitValuesError as error:
            raise InputError(f"{name}: {error}") from error
    try:
        _check_sample(values, [found for _, found in sample])
    except UnfitValuesError as error:
        raise InputError(f"{uri}: the sampled images taken together: {error}") from error
    replace(DatasetHeader.read(uri), values=values).write(uri)
    return open_dataset(uri)


def find_unfit_range(inventory: Inventory, rows: Ints) -> list[Finding]:
    """Find whether the data set's stretch makes a sample of the images of rows[M] black or white.

    Images that cannot be read, or lack bands, are left to describe_decoding.
    """
    sample = []
    for row in choose_sample(inventory, rows).tolist():
        try:
            found = _read_row(inventory, row)
            if found is not None:
                inventory.values.choose(found.values)
                sample.append(found)
        except (InputError, UnfitValuesError):
            continue
    try:
        _check_sample(inventory.values, sample)
    except UnfitValuesError as error:
        return [Finding("fault", "images", f"the sampled images taken together: {error}")]
    return []


def _check_sample(values: ImageValues, sample: list[RawValues]) -> None:
    """Raise UnfitValuesError where values make the images of a sample black or white, together."""
    others = [found for found in sample if found.values.dtype != np.uint8]
    if others:
        rows = np.concatenate([_thin(values, found).ravel() for found in others])
        values.check_sample(rows[np.isfinite(rows)], others[0].values.dtype)


def _read_sample(dataset: GeoDataset) -> Iterator[tuple[str, RawValues]]:
    """Yield name and values of a sample of the images, without those of plain bytes."""
    inventory = Inventory.read(dataset)
    for row in choose_sample(inventory, inventory.first_of_images()).tolist():
        found = _read_row(inventory, row)
        if found is not None:
            yield inventory.label_with_uri(row), found


def _read_row(inventory: Inventory, row: int) -> RawValues | None:
    """Read the values of a row's image; None for one of plain bytes. Raises InputError."""
    try:
        return _read_values(inventory.read_image(row))
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{inventory.label_with_uri(row)}: {error}") from error


def _read_values(data: bytes) -> RawValues | None:
    """Read the values of an image file; None for one of plain bytes of brightness.

    Raises ValueError for a file that is damaged or no image.
    """
    try:
        with Image.open(io.BytesIO(data), formats=list_formats(data)) as image:
            if not has_more_values(image, all_bands=True):
                return read_single_band(image) if is_single_band(image) else None
    except UnidentifiedImageError as error:
        if not data.startswith(TIFF_STARTS):
            raise ValueError(describe_content(data)) from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return read_bands(data, MAX_PIXELS)


def _find_limits(
    uri: str, stretch: Stretch, values: ImageValues, sample: list[RawValues]
) -> Stretch:
    """Return the limits of percentiles, of each band that is shown."""
    from s4g_ray.data.pixels.stretch import Stretch

    shown = [_thin(values, found) for found in sample if found.values.dtype != np.uint8]
    if not shown:
        raise InputError(
            f"{uri}: the images that were looked at hold bytes alone, which stay as they are; no"
            " stretch is needed"
        )
    if len({found.shape[1] for found in shown}) > 1:
        raise InputError(f"{uri}: some images have one band and others three; give --bands")
    rows = np.concatenate(shown)
    rows = rows[np.isfinite(rows).all(axis=1)]
    if not len(rows):
        raise InputError(f"{uri}: the images that were looked at hold no data")
    low, high = np.percentile(rows, stretch.percentiles or (2, 98), axis=0)
    high = np.where(high > low, high, low + 1)  # a plain band
    return Stretch(tuple(map(float, low)), tuple(map(float, high)))


def _thin(values: ImageValues, found: RawValues) -> NDArray[np.float64]:
    """Return some rows [N, C] of the bands that are shown, spread over the image; NaN: no data."""
    rows = _take_some(values.choose(found.values)).astype(np.float64)
    if found.valid is not None:
        rows[~_take_some(values.choose(found.valid))] = np.nan
    return rows


def _take_some(values: NDArray[Any]) -> NDArray[Any]:
    flat = values.reshape(-1, values.shape[2])
    return flat[:: max(1, len(flat) // VALUES_AT_MOST)]
