"""Decide, without Ray, what each shard holds, which input is refused and how answers merge.

A shard holds a range of the references' kept rows: the rows of published embedding tables, part
by part, whose ids the index is restricted to (all rows without a restriction).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.data.tables.embedding_table import open_embeddings, read_embedding_part
from s4g_ray.errors import RunError
from s4g_ray.index.top_k import Found
from s4g_ray.row_lookup import rows_of
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, Stamp


@dataclass(frozen=True)
class TablePart:
    """A part of a published embedding table."""

    folder: str
    part: Part

    @property
    def uri(self) -> str:
        """Path of the part's file."""
        return files.join(self.folder, self.part.name)


@dataclass(frozen=True)
class RowRange:
    """Rows start..stop of a part, counted among its kept rows, which keep the part's order."""

    source: TablePart
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class PartCount(NamedTuple):
    """Number of kept rows of a part, and D and type of its vectors."""

    kept: int
    dim: int
    dtype: str


def open_sources(
    folders: Sequence[str], stamp: Stamp | None = None
) -> tuple[list[TablePart], Stamp | None]:
    """Open the references of published embedding tables: their parts in row order, and the stamp.

    Raises RunError when a table is unpublished, was not made from `stamp`, or carries another
    stamp than the first table.
    """
    if not folders:
        raise RunError("there is nothing to index: no embedding table is given")
    manifests = [open_embeddings(folder, "references", stamp=stamp) for folder in folders]
    sources: list[TablePart] = []
    for folder, manifest in zip(folders, manifests, strict=True):
        _require_same_stamp(folders[0], manifests[0].stamp, folder, manifest.stamp)
        sources.extend(TablePart(folder, part) for part in manifest.parts)
    return sources, manifests[0].stamp


def _require_same_stamp(
    first_folder: str, first: Stamp | None, folder: str, stamp: Stamp | None
) -> None:
    if first == stamp:
        return
    wanted = asdict(first) if first else {}
    found = asdict(stamp) if stamp else {}
    name = next(name for name in (wanted or found) if wanted.get(name) != found.get(name))
    raise RunError(
        f"embeddings from two checkpoints in one index: {first_folder} was made with {name}"
        f" {wanted.get(name)!r}, {folder} with {found.get(name)!r}; embed both from one checkpoint"
    )


def kept_rows(ids: Ints, wanted: Ints | None) -> Ints:
    """Return the rows of ids[n] that are among wanted[W] (sorted, unique); all rows for None."""
    if wanted is None:
        return np.arange(len(ids))
    return np.flatnonzero(rows_of(wanted, ids) >= 0)


def sorted_ids(ids: Ints | None) -> Ints | None:
    """Sort the ids that an index is restricted to; None stays None.

    Raises RunError when there are none, or one repeats.
    """
    if ids is None:
        return None
    wanted = np.unique(np.asarray(ids, dtype=np.int64))
    if not len(wanted) or len(wanted) != len(ids):
        raise RunError(
            f"the {len(ids)} ids to index hold {len(wanted)} different ones; give each once,"
            " and at least one"
        )
    return wanted


def check_vectors(
    sources: Sequence[TablePart], counts: Sequence[PartCount], stamp: Stamp | None
) -> int:
    """Check that the vectors of all parts have the same D and dtype, and return D.

    The stamp gives D and dtype, or the first part where there is no stamp. Raises RunError for the
    first part that differs.
    """
    dim, dtype = (stamp.dim, stamp.dtype) if stamp else (counts[0].dim, counts[0].dtype)
    for source, count in zip(sources, counts, strict=True):
        if (count.dim, count.dtype) != (dim, dtype):
            raise RunError(
                f"{source.uri} holds vectors of D={count.dim}, {count.dtype}, where D={dim},"
                f" {dtype} is wanted; remove {source.folder} and embed it anew"
            )
    return dim


def check_ids(
    ids: Ints, counts: Sequence[int], sources: Sequence[TablePart], wanted: Ints | None
) -> None:
    """Check ids[N] of the kept rows of all parts; counts[P]: the kept rows of each part.

    Raises RunError for ids that repeat, are negative, or are wanted and missing.
    """
    order = np.argsort(ids, kind="stable")
    ranked = ids[order]
    repeats = np.flatnonzero(ranked[1:] == ranked[:-1])
    if len(repeats):
        rows = order[repeats[0] : repeats[0] + 2]
        parts = np.searchsorted(np.cumsum(counts), rows, side="right").tolist()
        raise RunError(
            f"id {ids[rows[0]]} occurs twice, in {sources[parts[0]].uri} and in"
            f" {sources[parts[1]].uri} ({len(repeats)} repeated in all); an index holds each id"
            " once: name each table once, and give references of different data sets different ids"
        )
    if len(ids) and ranked[0] < 0:
        raise RunError(f"id {ranked[0]} is negative; ids must be 0 or more")
    if wanted is not None and len(ids) < len(wanted):
        missing = np.setdiff1d(wanted, ids, assume_unique=True)
        folders = ", ".join(dict.fromkeys(source.folder for source in sources))
        raise RunError(
            f"{len(missing)} of {len(wanted)} ids to index are not in {folders}, the first is"
            f" {missing[0]}; embed the whole collection, or leave them out"
        )


def share_rows(
    sources: Sequence[TablePart], counts: Sequence[int], num_shards: int
) -> list[list[RowRange]]:
    """Divide the kept rows into one range a shard; sizes differ by one row at most.

    counts[P]: the kept rows of each part. Raises RunError for fewer rows than shards.
    """
    ends = np.cumsum(counts)
    total = int(ends[-1])
    if total < num_shards:
        raise RunError(
            f"{total} references cannot fill mining.num_shards={num_shards}; lower it to at most"
            f" {total}"
        )
    shares = []
    for shard in range(num_shards):
        first = total * shard // num_shards
        last = total * (shard + 1) // num_shards
        shares.append(list(_cut_rows(sources, ends, first, last)))
    return shares


def _cut_rows(
    sources: Sequence[TablePart], ends: Ints, first: int, last: int
) -> Iterator[RowRange]:
    """Yield the ranges of parts that make up kept rows first..last; ends[P]: last row of a part."""
    for number in range(int(np.searchsorted(ends, first, side="right")), len(sources)):
        offset = int(ends[number - 1]) if number else 0
        end = int(ends[number])
        if offset >= last:
            return
        if end > offset:
            yield RowRange(sources[number], max(first - offset, 0), min(last, end) - offset)


def read_ranges(
    ranges: Sequence[RowRange], wanted: Ints | None, rows: Ints | None = None
) -> Iterator[tuple[Ints, Floats32]]:
    """Yield ids[n], vectors[n, D] of each range, or of `rows` alone (counted over all ranges).

    Holds one part in memory at a time and skips parts without rows to read. Raises RunError for a
    part that is missing or altered, and for vectors that are not finite.
    """
    first = 0
    for piece in ranges:
        if rows is None:
            picked = np.arange(len(piece))
        else:
            picked = rows[(rows >= first) & (rows < first + len(piece))] - first
        first += len(piece)
        if not len(picked):
            continue
        table = read_embedding_part(piece.source.folder, piece.source.part)
        kept = kept_rows(table.ids, wanted)[piece.start : piece.stop][picked]
        ids = table.ids[kept]
        vectors = table.vectors[kept]
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            raise RunError(
                f"{piece.source.uri}: the embedding of id {ids[bad[0]]} is not finite"
                f" ({len(bad)} such); remove {piece.source.folder} and embed it anew, from a"
                " checkpoint that is finite"
            )
        yield ids, vectors


def merge_found(found: Sequence[Found], k: int) -> Found:
    """Merge answers ids[M, n], scores[M, n] to the same queries into the k best, ties by lower id.

    The only merge rule of the index. n may differ between answers; returns fewer than k columns
    when all answers together have fewer.
    """
    ids = np.concatenate([ids for ids, _ in found], axis=1)
    scores = np.concatenate([scores for _, scores in found], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=1)
    # a tie down to rank k + 1 may change the result; few rows have one, and sorting by two keys
    # is slow
    tied = np.flatnonzero((ranked[:, 1 : k + 1] == ranked[:, :-1][:, :k]).any(axis=1))
    order[tied] = np.lexsort((ids[tied], -scores[tied]), axis=1)
    order = order[:, :k]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)
