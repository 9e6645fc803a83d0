"""Turn the ids, coordinates and vectors of an index into the bytes of a file, and back.

A file holds HEADER numbers, ids[N], coordinates[N, 2] where the index has them, and the vectors.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Ints
from s4g_ray.index.plan import IndexPlan
from s4g_ray.index.row_table import RowTable
from s4g_ray.index.stores.dense import DenseStore
from s4g_ray.index.stores.hnsw import HnswStore
from s4g_ray.index.stores.ivf import IvfStore
from s4g_ray.index.stores.store import Store
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part

DENSE_TYPES: dict[str, type] = {"flat": np.float32, "sqfp16": np.float16}
HEADER = 4  # format, rows, whether coordinates follow, 0
FORMAT = 0x5334_4749  # "S4GI"


def to_bytes(table: RowTable, store: Store) -> bytes:
    """Return the file of an index; it is in memory once, beside the index."""
    file = io.BytesIO()
    has_coordinates = int(table.coordinates is not None)
    file.write(np.array([FORMAT, len(table.ids), has_coordinates, 0], np.int64).data)
    file.write(np.ascontiguousarray(table.ids).data)
    if table.coordinates is not None:
        file.write(np.ascontiguousarray(table.coordinates).data)
    store.write(file)
    return file.getvalue()


def from_bytes(data: bytes, plan: IndexPlan) -> tuple[RowTable, Store]:
    """Read the file of an index; copies ids, so that they do not keep the whole file in memory.

    Raises ValueError or RuntimeError for other data.
    """
    number, rows, has_coordinates, _ = np.frombuffer(data, np.int64, HEADER).tolist()
    if number != FORMAT:
        raise ValueError("another format")
    start = 8 * HEADER
    ids = np.frombuffer(data, np.int64, rows, start).copy()
    start += 8 * rows
    coordinates = None
    if has_coordinates:
        coordinates = np.frombuffer(data, np.float64, 2 * rows, start).reshape(rows, 2).copy()
        start += 16 * rows
    store: Store
    if plan.is_exact:
        vectors: NDArray[Any] = np.frombuffer(data, DENSE_TYPES[plan.kind], offset=start)
        store = DenseStore(vectors.reshape(rows, plan.dim))
    elif plan.kind == "hnsw":
        store = HnswStore.from_bytes(memoryview(data)[start:], plan.ef_search)
    else:
        store = IvfStore.from_bytes(memoryview(data)[start:], plan.nprobe)
    if len(store) != rows:
        raise ValueError(f"{len(store)} codes for {rows} ids")
    return RowTable(ids, coordinates), store


def read_ids(folder: str, part: Part) -> Ints:
    """Read the ids[N] of a published file, and no more of it; rows that are gone have GONE.

    Does not notice bytes that were altered in place. Raises ValueError for another format.
    """
    uri = files.join(folder, part.name)
    number, rows, _, _ = np.frombuffer(files.read_bytes(uri, 0, 8 * HEADER), np.int64).tolist()
    if number != FORMAT:
        raise ValueError(f"{uri} is of another format")
    return np.frombuffer(files.read_bytes(uri, 8 * HEADER, 8 * rows), np.int64)
