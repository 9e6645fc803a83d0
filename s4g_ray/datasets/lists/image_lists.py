"""Read the lists of a folder's images, CSV or Parquet, into columns.

Every error names the file and the line, or the row of a Parquet file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from s4g_ray.arrays import Bools, Floats64, Ints
from s4g_ray.data.image_table import View
from s4g_ray.datasets.lists.list_columns import ListedChunk
from s4g_ray.datasets.lists.list_files import CsvList, ParquetList
from s4g_ray.datasets.lists.list_options import ListOptions
from s4g_ray.datasets.source import SourceFolder
from s4g_ray.errors import InputError

Reader = CsvList | ParquetList


@dataclass
class ImageList:
    """The N rows of a list, as columns in its order. Coordinates are NaN where empty."""

    uri: str
    unit: str  # what `numbers` are of the file: line or row
    numbers: NDArray[np.int32]
    ids: Ints
    lat: Floats64
    lon: Floats64
    headings: NDArray[np.float32] | None
    texts: list[pa.Table]  # path, and key and region where the list has them
    splits: NDArray[np.uint8]  # as in SPLIT_CODES
    place_ids: Ints  # -1 until it is known, and of rows that are left out

    @classmethod
    def from_chunks(cls, reader: Reader, chunks: list[ListedChunk]) -> ImageList:
        """Join the chunks of a list, which are emptied: at most one column is in memory twice."""
        columns = {
            name: [getattr(chunk, name) for chunk in chunks]
            for name in ("numbers", "ids", "lat", "lon", "headings", "splits", "texts")
        }
        chunks.clear()

        def join(name: str) -> NDArray[Any]:
            return np.concatenate(columns.pop(name))

        has_headings = reader.columns is not None and "heading" in reader.columns.index
        numbers = join("numbers").astype(np.int32)
        return cls(
            uri=reader.uri,
            unit=reader.unit,
            numbers=numbers,
            ids=join("ids"),
            lat=join("lat"),
            lon=join("lon"),
            headings=join("headings") if has_headings else None,
            texts=columns["texts"],
            splits=join("splits"),
            place_ids=np.full(len(numbers), -1, dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def locate(self, row: int) -> str:
        """Return the file and the line of a row, for messages."""
        return f"{self.uri}, {self.unit} {self.numbers[row]}"

    def column(self, name: str) -> pa.ChunkedArray:
        """Return the texts of a column, without copies."""
        return pa.chunked_array([table[name].combine_chunks() for table in self.texts], pa.string())

    def keep(self, chosen: Bools) -> ImageList:
        """Return the list with the chosen[N] rows alone."""
        return replace(
            self,
            numbers=self.numbers[chosen],
            ids=self.ids[chosen],
            lat=self.lat[chosen],
            lon=self.lon[chosen],
            headings=None if self.headings is None else self.headings[chosen],
            texts=[texts for _, texts in self.iterate(chosen)],
            splits=self.splits[chosen],
            place_ids=self.place_ids[chosen],
        )

    def replace_paths(self, paths: Mapping[str, str]) -> None:
        """Give images other paths: by the path that the list has."""
        old = pa.array(list(paths), pa.string())
        new = pa.array(list(paths.values()), pa.string())
        for number, table in enumerate(self.texts):
            found = pc.index_in(table["path"], value_set=old)
            if found.null_count < len(table):
                path = pc.coalesce(new.take(found.combine_chunks()), table["path"].combine_chunks())
                column = table.column_names.index("path")
                self.texts[number] = table.set_column(column, "path", path)

    def iterate(self, chosen: Bools) -> Iterator[tuple[Ints, pa.Table]]:
        """Yield the chosen[N] rows: consecutive row numbers, and their texts."""
        first = 0
        for texts in self.texts:
            within = np.flatnonzero(chosen[first : first + len(texts)])
            if len(within):
                yield within + first, texts.take(pa.array(within))
            first += len(texts)


def read_list(
    source_folder: SourceFolder, name: str, view: View, options: ListOptions
) -> ImageList:
    """Read and check all rows of a list: Parquet where its name ends so, else CSV with a header.

    Raises InputError for a file without rows, missing columns, bad values and repeated ids.
    """
    with source_folder.open_file(name) as stream:
        kind = ParquetList if name.endswith(".parquet") else CsvList
        reader: Reader = kind(source_folder.join(name), stream, view, options)
        images = ImageList.from_chunks(reader, list(reader.read()))
    described = reader.describe()
    if described:
        source_folder.add_note(f"{reader.uri}: {', '.join(described)}")
    if reader.columns is not None and "lat" not in reader.columns.index:
        source_folder.add_note(
            f"{reader.uri} has no columns {options.lat_column} and {options.lon_column}:"
            " coordinates are null"
        )
    _check_unique_ids(images)
    return images


def _check_unique_ids(images: ImageList) -> None:
    """Raise InputError for the first row whose id an earlier row has."""
    ids = images.ids
    if (ids[1:] > ids[:-1]).all():
        return
    order = np.argsort(ids, kind="stable")
    repeated = order[1:][ids[order[1:]] == ids[order[:-1]]]
    if len(repeated):
        later = int(repeated.min())
        earlier = int(np.flatnonzero(ids == ids[later])[0])
        raise InputError(
            f"{images.locate(later)}: id {ids[later]} is already used at"
            f" {images.locate(earlier)}; give each row its own"
        )


def number_keys(references: ImageList, queries: ImageList) -> Ints:
    """Number places in the order in which the references' keys first appear; set place_ids.

    Returns the queries whose key no reference has.
    """
    keys = references.column("key")
    distinct = pc.unique(keys)
    references.place_ids = _find_keys(keys, distinct)
    queries.place_ids = _find_keys(queries.column("key"), distinct)
    return np.flatnonzero(queries.place_ids < 0)


def _find_keys(keys: pa.ChunkedArray, distinct: pa.Array) -> Ints:
    return np.asarray(pc.fill_null(pc.index_in(keys, value_set=distinct), -1)).astype(np.int64)
