"""Give the folder of a data set's images anew, after they were moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from s4g_ray.arrays import space_rows
from s4g_ray.config.data_schema import ImageOptions
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.data.format.header import DatasetHeader
from s4g_ray.data.format.image_paths import are_whole, relate, resolve
from s4g_ray.data.image_table import VIEWS
from s4g_ray.datasets.inspection.image_files import find_missing_files
from s4g_ray.errors import InputError
from s4g_ray.progress import ignore
from s4g_ray.storage import files

NUM_SAMPLED = 64  # images of a view that are looked for
NUM_THREADS = 16


@dataclass(frozen=True)
class Relocated:
    """A data set whose images have another folder."""

    dataset: GeoDataset
    relative: int  # rows whose paths start from the folder
    absolute: int  # rows whose paths do not


def relocate(uri: str, root: str) -> Relocated:
    """Write the folder of the images into dataset.json; rows and fingerprint stay.

    Looks for a sample of the images first. Raises InputError for the errors of open_dataset, for a
    data set without relative paths, and where images of the sample are not below `root`.
    """
    uri = files.absolute(uri)
    root = files.absolute(root)
    dataset = open_dataset(uri, ImageOptions(root))
    num_rows = 0
    num_absolute = 0
    sample: list[str] = []
    for view in VIEWS:
        uris = getattr(dataset, view).to_table(columns=["uri"])["uri"]
        relative = uris.filter(pc.invert(are_whole(uris)))
        num_rows += len(uris)
        num_absolute += len(uris) - len(relative)
        sample.extend(_take_sample(relative))
    if not sample:
        raise InputError(
            f"{uri}: all paths of images are absolute, and {root} changes none of them; convert"
            " again"
        )
    _check_sample(uri, root, sample)
    header = DatasetHeader.read(uri)
    replace(header, images_root=relate(uri, root)).write(uri)
    return Relocated(dataset, num_rows - num_absolute, num_absolute)


def _take_sample(paths: pa.ChunkedArray) -> list[str]:
    rows = space_rows(len(paths), NUM_SAMPLED)
    return [str(path) for path in paths.take(pa.array(rows)).to_pylist()]


def _check_sample(uri: str, root: str, sample: Sequence[str]) -> None:
    """Raise InputError where files of a sample of relative paths are missing."""
    paths = [resolve(root, path) for path in dict.fromkeys(sample)]
    missing = find_missing_files(paths, num_threads=NUM_THREADS, on_progress=ignore)
    if missing:
        raise InputError(
            f"{len(missing)} of {len(paths)} images that were looked for are not there, as"
            f" {paths[min(missing)]}; give the folder that the paths of {uri} start from (there:"
            f" {sample[0]})"
        )
