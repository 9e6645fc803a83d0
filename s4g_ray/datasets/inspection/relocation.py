"""Give the folder of a data set's images anew, after they were moved."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace

from s4g_ray.config.data_schema import ImageOptions
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.data.format.header import DatasetHeader
from s4g_ray.data.format.image_paths import relate
from s4g_ray.data.format.moved_images import check_images_root
from s4g_ray.data.image_table import VIEWS
from s4g_ray.storage import files


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
    columns = [getattr(dataset, view).to_table(columns=["uri"])["uri"] for view in VIEWS]
    remedy = f"convert again with --name {shlex.quote(dataset.name)}"  # keeps the fingerprint
    relative = check_images_root(uri, root, *columns, remedy=remedy)
    header = DatasetHeader.read(uri)
    replace(header, images_root=relate(uri, root)).write(uri)
    return Relocated(dataset, relative, sum(map(len, columns)) - relative)
