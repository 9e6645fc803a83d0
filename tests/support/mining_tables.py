"""Publish tables of query embeddings, for tests of mining."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from s4g_ray.arrays import Ints
from s4g_ray.storage.manifest import Part, Stamp, publish, write_part

STAMP = Stamp(step=4, weights_sha256="a", preprocessing="p", dataset="d", dim=6, dtype="float32")


Vectors = NDArray[np.float32] | NDArray[np.float16]


def write_queries(
    folder: str,
    ids: Ints,
    places: Ints,
    vectors: Vectors,
    part_rows: int,
    bad_images: int = 0,
) -> None:
    """Publish a table of query embeddings without references, as write_view writes it."""
    parts = write_view(folder, "queries", ids, places, vectors, part_rows)
    publish(
        folder,
        "embeddings",
        parts,
        replace(STAMP, dtype=str(vectors.dtype)),
        {"bad_images": ["a reason"] * bad_images},
    )


def write_view(
    folder: str, view: str, ids: Ints, places: Ints, vectors: Vectors, part_rows: int
) -> list[Part]:
    """Write a view of a table in the order of its rows.

    A part has `part_rows` rows, or more where a place would lie in two parts.
    """
    starts = [0]
    for row in range(1, len(ids)):
        if row - starts[-1] >= part_rows and places[row] != places[row - 1]:
            starts.append(row)
    parts = []
    for number, (start, end) in enumerate(itertools.pairwise([*starts, len(ids)])):
        rows = slice(start, end)
        values = pa.FixedSizeListArray.from_arrays(
            pa.array(vectors[rows].ravel()), vectors.shape[1]
        )
        buffer = io.BytesIO()
        pq.write_table(
            pa.table({"id": ids[rows], "place_id": places[rows], "embedding": values}), buffer
        )
        name = f"{view}/part-{number:05d}.parquet"
        parts.append(write_part(folder, name, buffer.getvalue(), len(ids[rows])))
    return parts
