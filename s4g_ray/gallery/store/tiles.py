"""Define the rows of a gallery: Tiles, which readers hold, and the Parquet files of all columns."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from s4g_ray.arrays import Floats64, Ints
from s4g_ray.data.sphere import span_longitudes
from s4g_ray.data.tables.arrow_texts import read_texts
from s4g_ray.data.tables.text_column import TextColumn
from s4g_ray.errors import RunError
from s4g_ray.row_lookup import rows_of
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, read_part, write_part
from s4g_ray.storage.parquet import refuse_extension_types

FOLDER = "tiles"
ROWS_PER_PART = 1_000_000
DIGEST_BYTES = 16
SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("place_id", pa.int64(), nullable=False),
        pa.field("lat", pa.float64(), nullable=False),
        pa.field("lon", pa.float64(), nullable=False),
        pa.field("size_m", pa.float32()),
        pa.field("region", pa.string()),
        pa.field("source_id", pa.string()),
        pa.field("uri", pa.string(), nullable=False),  # from the folder of images, or absolute
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        # of the image's bytes: an unchanged image keeps its embedding
        pa.field("digest", pa.binary(DIGEST_BYTES), nullable=False),
        # the version whose embedding table holds the tile
        pa.field("embedded_in", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Tiles:
    """Where N tiles lie, by ascending id: ids[N], lat[N], lon[N] (degrees), size_m[N] (metres).

    size_m is the side of the square of ground that a tile shows; NaN where it is unknown.
    """

    ids: Ints
    lat: Floats64
    lon: Floats64
    size_m: Floats64

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, ids: Ints) -> Ints:
        """Return the rows of ids[...] -> rows[...]. Raises KeyError for an id without a tile."""
        wanted = np.asarray(ids, np.int64)
        found = rows_of(self.ids, wanted)
        if (found < 0).any():
            raise KeyError(int(wanted[found < 0].flat[0]))
        return found

    def bounds(self) -> tuple[float, float, float, float]:
        """Return west, south, east and north of the centres; east below west across 180 degrees."""
        west, east = span_longitudes(self.lon)
        return west, float(self.lat.min()), east, float(self.lat.max())


@dataclass(frozen=True)
class TileFiles:
    """Where the images of N tiles lie, in the rows of Tiles; offset and length -1: a whole file."""

    uris: TextColumn
    offsets: Ints
    lengths: Ints


def tiles_of(table: pa.Table) -> Tiles:
    """Return the columns of a table with SCHEMA's columns, sorted by id."""
    return Tiles(
        ids=table["id"].to_numpy(),
        lat=table["lat"].to_numpy(),
        lon=table["lon"].to_numpy(),
        size_m=pc.fill_null(table["size_m"], float("nan")).to_numpy().astype(np.float64),
    )


def files_of(table: pa.Table) -> TileFiles:
    """Return where the images of a table's tiles lie."""
    return TileFiles(
        uris=read_texts(table["uri"]),
        offsets=pc.fill_null(table["offset"], -1).to_numpy(),
        lengths=pc.fill_null(table["length"], -1).to_numpy(),
    )


def write_tiles(folder: str, table: pa.Table, token: str) -> list[Part]:
    """Write a table, sorted by id, as parts of a version's folder, which is published later.

    token: of the writer, in the names of the parts.
    """
    parts = []
    for number, start in enumerate(range(0, max(len(table), 1), ROWS_PER_PART)):
        rows = table.slice(start, ROWS_PER_PART).combine_chunks()
        name = f"{FOLDER}/part-{token}-{number:05d}.parquet"
        parts.append(write_part(folder, name, encode_table(rows), len(rows)))
    return parts


def encode_table(table: pa.Table) -> bytes:
    """Return the bytes of a Parquet file of a table."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def read_tiles(
    folder: str, parts: Sequence[Part], columns: Sequence[str] | None = None
) -> pa.Table:
    """Read columns (None: all) of a version's tiles. Raises RunError for altered files."""
    tables = [read_rows(folder, part, columns) for part in parts]
    return pa.concat_tables(tables)


def read_rows(folder: str, part: Part, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a part with SCHEMA's columns. Raises RunError when it was altered."""
    uri = files.join(folder, part.name)
    names = list(columns) if columns is not None else SCHEMA.names
    try:
        table = pq.read_table(io.BytesIO(read_part(folder, part)), columns=names)
    except pa.ArrowException as error:
        raise RunError(f"{uri} is no readable Parquet file: {error}") from error
    wanted = pa.schema([SCHEMA.field(name) for name in names])
    if not table.schema.remove_metadata().equals(wanted):
        raise RunError(f"{uri} has other columns than tiles: {table.schema.names}")
    return refuse_extension_types(table, uri)
