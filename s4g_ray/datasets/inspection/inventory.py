"""What inspection works on: the rows of both views as arrays, and the image files behind them, in parallel."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from s4g_ray.arrays import Bools, Floats64, Ints, group
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import VIEWS, View
from s4g_ray.data.images import decode_pixels
from s4g_ray.data.schema import SPLITS, gallery_splits
from s4g_ray.data.sphere import EARTH_RADIUS_M, chord_of, metres_between, unit_sphere
from s4g_ray.errors import InputError, StoreError
from s4g_ray.progress import Update
from s4g_ray.storage import files

Item = TypeVar("Item")
Result = TypeVar("Result")
SPLIT_NAMES = SPLITS["references"]
HELD_OUT = ("val", "test")
_COLUMNS = ["id", "place_id", "uri", "offset", "length", "lat", "lon", "split", "region"]


@dataclass(frozen=True)
class Inventory:
    """The rows of a data set, references before queries: arrays of N."""

    is_query: Bools
    ids: Ints
    place_ids: Ints
    splits: Ints  # numbers in SPLIT_NAMES
    regions: Ints  # numbers in region_names; -1 where null
    region_names: list[str]
    lat: Floats64  # degrees; NaN where null
    lon: Floats64
    uris: Any  # pa.StringArray, as written in the data set
    files: Ints  # numbers in paths
    paths: list[str]  # of the distinct files: absolute, or with a scheme
    offsets: Ints  # bytes; -1: the whole object
    lengths: Ints
    images: Ints  # 0..I-1, equal where file, offset and length are

    @classmethod
    def read(cls, dataset: GeoDataset) -> Inventory:
        """The rows of an opened data set, in the order of its files."""
        tables = [getattr(dataset, view).to_table(columns=_COLUMNS) for view in VIEWS]
        table = pa.concat_tables(tables, promote_options="permissive")
        columns = {name: table[name].combine_chunks() for name in _COLUMNS}
        uris, regions = columns["uri"].dictionary_encode(), columns["region"].dictionary_encode()
        paths: dict[str, int] = {}
        joined = (files.join(dataset.uri, uri) for uri in uris.dictionary.to_pylist())
        file_of_uri = np.array(
            [paths.setdefault(path, len(paths)) for path in joined], dtype=np.int64
        )
        file_numbers = file_of_uri[uris.indices.to_numpy()]
        offsets, lengths = _filled(columns["offset"], -1), _filled(columns["length"], -1)
        return cls(
            is_query=np.arange(len(table)) >= len(tables[0]),
            ids=columns["id"].to_numpy(),
            place_ids=columns["place_id"].to_numpy(),
            splits=_filled(
                pc.index_in(columns["split"], value_set=pa.array(SPLIT_NAMES)), -1
            ).astype(np.int64),
            regions=_filled(regions.indices, -1).astype(np.int64),
            region_names=regions.dictionary.to_pylist(),
            lat=_filled(columns["lat"], float("nan")),
            lon=_filled(columns["lon"], float("nan")),
            uris=columns["uri"],
            files=file_numbers,
            paths=list(paths),
            offsets=offsets,
            lengths=lengths,
            images=group(file_numbers, offsets, lengths),
        )

    def rows(self, view: View | None, *splits: str) -> Ints:
        """Row numbers of a view, of some splits; of all where none is named."""
        chosen = np.isin(self.splits, [SPLIT_NAMES.index(split) for split in splits or SPLIT_NAMES])
        return np.flatnonzero(chosen & (view is None or self.is_query == (view == "queries")))

    def located(self, rows: Ints) -> Ints:
        """Those of some rows that have coordinates."""
        return rows[np.isfinite(self.lat[rows])]

    def label(self, row: int) -> str:
        """A row for people: view, id, place."""
        view = "query" if self.is_query[row] else "reference"
        return f"{view} id {self.ids[row]} (place {self.place_ids[row]})"

    def label_with_uri(self, row: int) -> str:
        """A row for people, with its image."""
        part = f" at byte {self.offsets[row]}" if self.offsets[row] >= 0 else ""
        return f"{self.label(row)} {self.uris[int(row)].as_py()}{part}"


def _filled(column: Any, value: float) -> NDArray[Any]:
    return np.asarray(
        pc.fill_null(column, pa.scalar(value, column.type)).to_numpy(zero_copy_only=False)
    )


def num_distinct(groups: Ints, values: NDArray[Any]) -> Ints:
    """groups[N], values[N] -> how many distinct values each row's group has, [N]."""
    first = np.unique(group(groups, values), return_index=True)[1]
    counts = np.bincount(groups[first], minlength=int(groups.max(initial=-1)) + 1)
    return counts[groups].astype(np.int64)


def extent(lat: Floats64, lon: Floats64) -> dict[str, float]:
    """lat[N], lon[N] in degrees, N > 0 -> the smallest box, west > east where it spans the antimeridian, and its km.

    `km_east_west` is measured along the box's parallel that is nearest to the equator.
    """
    order = np.argsort(np.mod(lon, 360.0))
    around = np.mod(lon, 360.0)[order]
    gaps = np.diff(around, append=around[0] + 360.0)
    widest = int(gaps.argmax())
    south, north = float(lat.min()), float(lat.max())
    nearest_equator = 0.0 if south <= 0 <= north else min(abs(south), abs(north))
    east_west = math.radians(360.0 - float(gaps[widest])) * math.cos(math.radians(nearest_equator))
    return {
        "south": south,
        "north": north,
        "west": float(lon[order[(widest + 1) % len(order)]]),
        "east": float(lon[order[widest]]),
        "km_north_south": math.radians(north - south) * EARTH_RADIUS_M / 1000,
        "km_east_west": east_west * EARTH_RADIUS_M / 1000,
    }


def nearest_of_place(rows: Inventory) -> tuple[Ints, Ints]:
    """Row numbers of the queries whose place has a reference in their split, and of the nearest such reference.

    Exact, by a k-d tree over xyz and a fourth axis that sets places further apart than the sphere is wide.
    """
    places = np.unique(rows.place_ids, return_inverse=True)[1]
    found: list[tuple[Ints, Ints]] = []
    for split in ("train", *HELD_OUT):
        queries = rows.located(rows.rows("queries", split))
        gallery = gallery_splits(split) if split in HELD_OUT else [split]
        references = rows.located(rows.rows("references", *gallery))
        queries = queries[np.isin(places[queries], places[references])]
        if len(queries):
            of_queries, of_references = (
                np.column_stack([unit_sphere(rows.lat[of], rows.lon[of]), 4.0 * places[of]])
                for of in (queries, references)
            )
            found.append(
                (queries, references[cKDTree(of_references).query(of_queries, workers=-1)[1]])
            )
    empty = np.empty(0, dtype=np.int64)
    return np.concatenate([empty, *(q for q, _ in found)]), np.concatenate(
        [empty, *(r for _, r in found)]
    )


def queries_near_train(rows: Inventory, split: str, radius_m: float) -> tuple[Ints, Ints, Floats64]:
    """Row numbers of a split's queries within a radius of a train query, of the nearest train query, and metres."""
    queries, train = (
        rows.located(rows.rows("queries", split)),
        rows.located(rows.rows("queries", "train")),
    )
    if not len(queries) or not len(train):
        return queries[:0], train[:0], np.empty(0)
    tree = cKDTree(unit_sphere(rows.lat[train], rows.lon[train]))
    points = unit_sphere(rows.lat[queries], rows.lon[queries])
    nearest = np.asarray(tree.query(points, distance_upper_bound=chord_of(radius_m), workers=-1)[1])
    found = nearest < len(train)
    queries, train = queries[found], train[nearest[found]]
    metres = metres_between(rows.lat[queries], rows.lon[queries], rows.lat[train], rows.lon[train])
    return queries[metres <= radius_m], train[metres <= radius_m], metres[metres <= radius_m]


def missing_files(paths: Sequence[str], *, num_threads: int, on_progress: Update) -> dict[int, str]:
    """Numbers of the files that are not there, with the reason. Each folder is listed once, and no file is touched."""
    folders: dict[str, list[int]] = defaultdict(list)
    for number, path in enumerate(paths):
        folders[path.rpartition("/")[0] or "/"].append(number)

    def missing(folder: str) -> dict[int, str]:
        try:
            names = set(files.list_names(folder))
        except (StoreError, InputError):  # of the store, not of these files
            raise
        except (
            OSError,
            ValueError,
            ImportError,
        ) as error:  # ValueError: no such protocol; ImportError: its package
            return dict.fromkeys(folders[folder], f"{type(error).__name__}: {error}")
        return {
            number: "missing"
            for number in folders[folder]
            if paths[number].rpartition("/")[2] not in names
        }

    found: dict[int, str] = {}
    for part in in_parallel(
        missing, list(folders), num_threads=num_threads, on_progress=on_progress
    ):
        found.update(part)
    return found


@dataclass(frozen=True)
class DecodedImages:
    """What reading and decoding M images gave."""

    shapes: Ints  # [M, 2] height and width in pixels; 0 where undecodable
    digests: NDArray[np.bytes_]  # [M] sha256 of the bytes; empty where undecodable
    reasons: dict[int, str]  # of the undecodable, by number


def decode_images(
    inventory: Inventory, rows: Ints, *, num_threads: int, on_progress: Update
) -> DecodedImages:
    """Read and decode the images of rows[M]; no more than `num_threads` are in memory at a time."""

    def look(row: int) -> tuple[tuple[int, int], bytes, str]:
        part = (
            (int(inventory.offsets[row]), int(inventory.lengths[row]))
            if inventory.offsets[row] >= 0
            else ()
        )
        try:
            data = files.read_bytes(inventory.paths[inventory.files[row]], *part)
            height, width = decode_pixels(data).shape[-2:]
        except StoreError:
            raise
        except OSError as error:
            return (0, 0), b"", f"{type(error).__name__}: {error}"
        except (ValueError, EOFError) as error:
            return (0, 0), b"", str(error)
        return (height, width), hashlib.sha256(data).digest(), ""

    shapes = np.zeros((len(rows), 2), dtype=np.int64)
    digests = np.zeros(len(rows), dtype="S32")
    reasons: dict[int, str] = {}
    results = in_parallel(look, rows.tolist(), num_threads=num_threads, on_progress=on_progress)
    for number, (shape, digest, reason) in enumerate(results):
        shapes[number], digests[number] = shape, digest
        if reason:
            reasons[number] = reason
    return DecodedImages(shapes, digests, reasons)


def in_parallel(
    work: Callable[[Item], Result], items: Sequence[Item], *, num_threads: int, on_progress: Update
) -> Iterator[Result]:
    """work(item) of each item, in order; a few calls per thread wait, however many items there are."""
    remaining = iter(items)
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="inspect") as pool:
        try:
            for done in range(1, len(items) + 1):
                waiting.extend(
                    pool.submit(work, item)
                    for item in islice(remaining, 4 * num_threads - len(waiting))
                )
                result = waiting.popleft().result()
                on_progress(done, len(items))
                yield result
        finally:
            for future in waiting:
                future.cancel()
