"""Read the rows of a data set as arrays, and compute distances and extents of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from s4g_ray.arrays import Bools, Floats64, Ints, group
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.format.image_paths import resolve
from s4g_ray.data.image_table import VIEWS, View
from s4g_ray.data.pixels.image_values import AS_STORED, ImageValues
from s4g_ray.data.schema import SPLITS, gallery_splits
from s4g_ray.data.sphere import (
    EARTH_RADIUS_M,
    chord_of,
    metres_between,
    span_longitudes,
    unit_sphere,
)
from s4g_ray.storage import files

SPLIT_NAMES = SPLITS["references"]
HELD_OUT = ("val", "test")
_COLUMNS = ["id", "place_id", "uri", "offset", "length", "lat", "lon", "split", "region"]


@dataclass(frozen=True)
class Inventory:
    """The rows of a data set, references before queries, as arrays of N."""

    is_query: Bools
    ids: Ints
    place_ids: Ints
    splits: Ints  # positions in SPLIT_NAMES
    regions: Ints  # positions in region_names; -1 where null
    region_names: list[str]
    lat: Floats64  # degrees; NaN where null
    lon: Floats64
    uris: Any  # pa.StringArray, as written in the data set
    files: Ints  # positions in paths
    paths: list[str]  # the distinct files: absolute, or with a scheme
    offsets: Ints  # bytes; -1: the whole object
    lengths: Ints  # bytes; -1: the whole object
    images: Ints  # 0..I-1; equal where file, offset and length are equal
    values: ImageValues = AS_STORED  # how the values of the images become bytes

    @classmethod
    def read(cls, dataset: GeoDataset) -> Inventory:
        """Read the rows of an opened data set, in the order of its files."""
        tables = [getattr(dataset, view).to_table(columns=_COLUMNS) for view in VIEWS]
        table = pa.concat_tables(tables, promote_options="permissive")
        columns = {name: table[name].combine_chunks() for name in _COLUMNS}
        uris = columns["uri"].dictionary_encode()
        regions = columns["region"].dictionary_encode()
        splits = pc.index_in(columns["split"], value_set=pa.array(SPLIT_NAMES))
        numbers: dict[str, int] = {}  # of the distinct paths
        file_of_uri = []
        for uri in uris.dictionary.to_pylist():
            path = resolve(dataset.images_root, uri)
            file_of_uri.append(numbers.setdefault(path, len(numbers)))
        file_numbers = np.array(file_of_uri, dtype=np.int64)[uris.indices.to_numpy()]
        offsets = _fill_nulls(columns["offset"], -1)
        lengths = _fill_nulls(columns["length"], -1)
        return cls(
            is_query=np.arange(len(table)) >= len(tables[0]),
            ids=columns["id"].to_numpy(),
            place_ids=columns["place_id"].to_numpy(),
            splits=_fill_nulls(splits, -1).astype(np.int64),
            regions=_fill_nulls(regions.indices, -1).astype(np.int64),
            region_names=regions.dictionary.to_pylist(),
            lat=_fill_nulls(columns["lat"], float("nan")),
            lon=_fill_nulls(columns["lon"], float("nan")),
            uris=columns["uri"],
            files=file_numbers,
            paths=list(numbers),
            offsets=offsets,
            lengths=lengths,
            images=group(file_numbers, offsets, lengths),
            values=dataset.values,
        )

    def rows(self, view: View | None, *splits: str) -> Ints:
        """Return the row numbers of a view (None: both), of the given splits or else of all."""
        chosen = np.isin(self.splits, [SPLIT_NAMES.index(split) for split in splits or SPLIT_NAMES])
        if view is not None:
            chosen &= self.is_query == (view == "queries")
        return np.flatnonzero(chosen)

    def located(self, rows: Ints) -> Ints:
        """Return those of the given rows that have coordinates."""
        return rows[np.isfinite(self.lat[rows])]

    def first_of_images(self) -> Ints:
        """Return a row of each image: the first."""
        return np.unique(self.images, return_index=True)[1]

    def read_image(self, row: int) -> bytes:
        """Read the bytes of a row's image. Raises OSError, EOFError and StoreError."""
        path = self.paths[self.files[row]]
        if self.offsets[row] >= 0:
            return files.read_bytes(path, int(self.offsets[row]), int(self.lengths[row]))
        return files.read_bytes(path)

    def label(self, row: int) -> str:
        """Describe a row for people: view, id, place."""
        view = "query" if self.is_query[row] else "reference"
        return f"{view} id {self.ids[row]} (place {self.place_ids[row]})"

    def label_with_uri(self, row: int) -> str:
        """Describe a row for people, with its image."""
        text = f"{self.label(row)} {self.uris[int(row)].as_py()}"
        if self.offsets[row] >= 0:
            text += f" at byte {self.offsets[row]}"
        return text


def _fill_nulls(column: Any, value: float) -> NDArray[Any]:
    filled = pc.fill_null(column, pa.scalar(value, column.type))
    return np.asarray(filled.to_numpy(zero_copy_only=False))


def count_distinct(groups: Ints, values: NDArray[Any]) -> Ints:
    """groups[N], values[N] -> the number of distinct values in each row's group, [N]."""
    first = np.unique(group(groups, values), return_index=True)[1]
    counts = np.bincount(groups[first], minlength=int(groups.max(initial=-1)) + 1)
    return counts[groups].astype(np.int64)


def compute_extent(lat: Floats64, lon: Floats64) -> dict[str, float]:
    """lat[N], lon[N] in degrees, N > 0 -> the smallest box around the points, and its km.

    west > east where the box spans the antimeridian. `km_east_west` is measured along the box's
    parallel that is nearest to the equator.
    """
    west, east = span_longitudes(lon)
    south = float(lat.min())
    north = float(lat.max())
    nearest_equator = 0.0 if south <= 0 <= north else min(abs(south), abs(north))
    east_west = math.radians((east - west) % 360) * math.cos(math.radians(nearest_equator))
    return {
        "south": south,
        "north": north,
        "west": west,
        "east": east,
        "km_north_south": math.radians(north - south) * EARTH_RADIUS_M / 1000,
        "km_east_west": east_west * EARTH_RADIUS_M / 1000,
    }


def find_nearest_references(inventory: Inventory) -> tuple[Ints, Ints]:
    """Return the queries whose place has a reference, and the nearest such reference of each.

    Both are row numbers. A reference counts in the query's split (val and test: and in the
    gallery). Exact: uses a k-d tree over xyz and a fourth axis on which places are further apart
    than the sphere is wide.
    """
    places = np.unique(inventory.place_ids, return_inverse=True)[1]
    empty = np.empty(0, dtype=np.int64)
    found_queries = [empty]
    found_references = [empty]

    def points_of(rows: Ints) -> Floats64:
        xyz = unit_sphere(inventory.lat[rows], inventory.lon[rows])
        return np.column_stack([xyz, 4.0 * places[rows]])

    for split in ("train", *HELD_OUT):
        queries = inventory.located(inventory.rows("queries", split))
        galleries = gallery_splits(split) if split in HELD_OUT else [split]
        references = inventory.located(inventory.rows("references", *galleries))
        queries = queries[np.isin(places[queries], places[references])]
        if len(queries):
            tree = cKDTree(points_of(references))
            nearest = tree.query(points_of(queries), workers=-1)[1]
            found_queries.append(queries)
            found_references.append(references[nearest])
    return np.concatenate(found_queries), np.concatenate(found_references)


def find_queries_near_train(
    inventory: Inventory, split: str, radius_m: float
) -> tuple[Ints, Ints, Floats64]:
    """Find the queries of a split within a radius of a train query.

    Returns their row numbers, that of the nearest train query of each, and the metres between.
    """
    queries = inventory.located(inventory.rows("queries", split))
    train = inventory.located(inventory.rows("queries", "train"))
    if not len(queries) or not len(train):
        return queries[:0], train[:0], np.empty(0)
    lat = inventory.lat
    lon = inventory.lon
    tree = cKDTree(unit_sphere(lat[train], lon[train]))
    points = unit_sphere(lat[queries], lon[queries])
    nearest = np.asarray(tree.query(points, distance_upper_bound=chord_of(radius_m), workers=-1)[1])
    found = nearest < len(train)
    queries = queries[found]
    train = train[nearest[found]]
    metres = metres_between(lat[queries], lon[queries], lat[train], lon[train])
    within = metres <= radius_m
    return queries[within], train[within], metres[within]
