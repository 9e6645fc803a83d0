"""Published embedding tables of given vectors, and exact search over them by plain sorting."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from s4g_ray.storage.manifest import Stamp, publish, write_part

Array = NDArray[Any]
STAMP = Stamp(step=7, weights_sha256="w7", preprocessing="p", dataset="d", dim=16, dtype="float32")


def random_unit(rng: np.random.Generator, count: int, dim: int = 16) -> Array:
    vectors = rng.standard_normal((count, dim)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def encode(ids: Array, vectors: Array, group_rows: int | None = None) -> bytes:
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    table = pa.table(
        {
            "id": pa.array(ids, pa.int64()),
            "place_id": pa.array(ids + 1, pa.int64()),
            "embedding": column,
        }
    )
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        row_group_size=group_rows,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    return buffer.getvalue()


def write_parts(
    folder: Path | str,
    parts: Sequence[tuple[Array, Array]],
    stamp: Stamp | None = STAMP,
    group_rows: int | None = None,
) -> str:
    """Publish a table whose references are parts of (ids, vectors).

    Its queries hold the first reference, which a reader of references must not read.
    """
    named = [
        write_part(
            str(folder),
            f"references/part-{i:05d}.parquet",
            encode(ids, vectors, group_rows),
            len(ids),
        )
        for i, (ids, vectors) in enumerate(parts)
    ]
    ids, vectors = parts[0]
    named.append(
        write_part(str(folder), "queries/part-00000.parquet", encode(ids[:1], vectors[:1]), 1)
    )
    publish(str(folder), "embeddings", named, stamp)
    return str(folder)


def write_table(
    folder: Path | str,
    ids: Array,
    vectors: Array,
    part_rows: int = 50,
    stamp: Stamp | None = STAMP,
    group_rows: int | None = None,
) -> str:
    """Publish references in parts of part_rows."""
    starts = range(0, len(ids), part_rows)
    return write_parts(
        folder,
        [(ids[s : s + part_rows], vectors[s : s + part_rows]) for s in starts],
        stamp,
        group_rows,
    )


def sort_everything(queries: Array, vectors: Array, ids: Array, k: int) -> tuple[Array, Array]:
    """The oracle: float64 inner products of unit vectors, all of them sorted by score, then id."""
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    order = np.array([np.lexsort((ids, -row))[:k] for row in scores])
    return ids[order], np.take_along_axis(scores, order, axis=1)


def break_part(change: str) -> Callable[[Path], None]:
    """Return a function that damages a file: cut it short, alter a byte or remove it."""

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-10])

    def alter(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    changes: dict[str, Callable[[Path], None]] = {
        "cut": cut,
        "altered": alter,
        "removed": Path.unlink,
    }
    return changes[change]
