"""What a sharded index decides, without Ray: which rows a shard holds, what is refused, how answers merge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.data.tables.embedding_table import open_embeddings, read_embedding_part
from s4g_ray.errors import RunError
from s4g_ray.row_lookup import rows_of
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, Stamp

Found = tuple[Ints, Floats32]  # ids[M, k], scores[M, k], best first


@dataclass(frozen=True)
class TablePart:
    """A part of a published embedding table."""

    folder: str
    part: Part

    @property
    def uri(self) -> str:
        """Where the file is."""
        return files.join(self.folder, self.part.name)


@dataclass(frozen=True)
class RowRange:
    """Kept rows start..stop of a part. Kept are the rows that the index is to hold, in the part's order."""

    source: TablePart
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class PartCount(NamedTuple):
    """The kept rows of a part, and what its vectors are."""

    kept: int
    dim: int
    dtype: str


def open_sources(
    folders: Sequence[str], stamp: Stamp | None = None
) -> tuple[list[TablePart], Stamp | None]:
    """The parts of the references of published embedding tables, in row order, and the stamp that all of them carry.

    Raises RunError when a table is unpublished, not made from `stamp`, or made from something else than the first.
    """
    if not folders:
        raise RunError("there is nothing to index: no embedding table is given")
    manifests = [open_embeddings(folder, "references", stamp=stamp) for folder in folders]
    for folder, manifest in zip(folders, manifests, strict=True):
        _require_same_stamp(folders[0], manifests[0].stamp, folder, manifest.stamp)
    sources = [
        TablePart(f, part)
        for f, manifest in zip(folders, manifests, strict=True)
        for part in manifest.parts
    ]
    return sources, manifests[0].stamp


def _require_same_stamp(first: str, wanted: Stamp | None, folder: str, found: Stamp | None) -> None:
    if wanted == found:
        return
    a, b = (asdict(stamp) if stamp else {} for stamp in (wanted, found))
    name = next(name for name in (a or b) if a.get(name) != b.get(name))
    raise RunError(
        f"embeddings from two checkpoints in one index: {first} was made with {name} {a.get(name)!r}, {folder} with"
        f" {b.get(name)!r}; embed both from one checkpoint"
    )


def kept_rows(ids: Ints, wanted: Ints | None) -> Ints:
    """The rows of ids[n] that are among wanted[W], sorted and unique; None: all of them."""
    if wanted is None:
        return np.arange(len(ids))
    return np.flatnonzero(rows_of(wanted, ids) >= 0)


def sorted_ids(ids: Ints | None) -> Ints | None:
    """The ids that an index is to be restricted to, sorted. Raises RunError when there are none, or one repeats."""
    if ids is None:
        return None
    wanted = np.unique(np.asarray(ids, dtype=np.int64))
    if not len(wanted) or len(wanted) != len(ids):
        raise RunError(
            f"the {len(ids)} ids to index hold {len(wanted)} different ones; give each once, and at least one"
        )
    return wanted


def check_vectors(
    sources: Sequence[TablePart], counts: Sequence[PartCount], stamp: Stamp | None
) -> int:
    """D of the vectors of all parts. Raises RunError for the first part whose D or dtype is another than wanted.

    Wanted is what the stamp says, or the first part where there is none.
    """
    wanted = (stamp.dim, stamp.dtype) if stamp else counts[0][1:]
    for source, count in zip(sources, counts, strict=True):
        if count[1:] != wanted:
            raise RunError(
                f"{source.uri} holds vectors of D={count.dim}, {count.dtype}, where D={wanted[0]}, {wanted[1]} is"
                f" wanted; remove {source.folder} and embed it anew"
            )
    return wanted[0]


def check_ids(
    ids: Ints, counts: Sequence[int], sources: Sequence[TablePart], wanted: Ints | None
) -> None:
    """ids[N] of the kept rows, counts[P] of each part. Raises RunError for what repeats, is negative or is missing."""
    order = np.argsort(ids, kind="stable")
    ranked = ids[order]
    repeats = np.flatnonzero(ranked[1:] == ranked[:-1])
    if len(repeats):
        rows = order[repeats[0] : repeats[0] + 2]
        one, other = (
            sources[int(at)].uri for at in np.searchsorted(np.cumsum(counts), rows, side="right")
        )
        raise RunError(
            f"id {ids[rows[0]]} stands twice, in {one} and in {other} ({len(repeats)} repeated in all); an index holds"
            " each id once: name each table once, and give references of different data sets different ids"
        )
    if len(ids) and ranked[0] < 0:
        raise RunError(f"id {ranked[0]} is negative; ids must be 0 or more")
    if wanted is not None and len(ids) < len(wanted):
        missing = np.setdiff1d(wanted, ids, assume_unique=True)
        folders = ", ".join(dict.fromkeys(source.folder for source in sources))
        raise RunError(
            f"{len(missing)} of {len(wanted)} ids to index are not in {folders}, the first is {missing[0]};"
            " embed the whole collection, or leave them out"
        )


def share_rows(
    sources: Sequence[TablePart], counts: Sequence[int], num_shards: int
) -> list[list[RowRange]]:
    """Divide the kept rows, counts[P] of each part, into ranges of row order that differ by one row at most.

    Raises RunError when there are fewer rows than shards.
    """
    ends = np.cumsum(counts)
    total = int(ends[-1])
    if total < num_shards:
        raise RunError(
            f"{total} references cannot fill mining.num_shards={num_shards}; lower it to at most {total}"
        )
    bounds = [total * shard // num_shards for shard in range(num_shards + 1)]
    return [list(_slices(sources, ends, *bounds[shard : shard + 2])) for shard in range(num_shards)]


def _slices(sources: Sequence[TablePart], ends: Ints, first: int, last: int) -> Iterator[RowRange]:
    for number in range(int(np.searchsorted(ends, first, side="right")), len(sources)):
        offset = int(ends[number - 1]) if number else 0
        if offset >= last:
            return
        if ends[number] > offset:
            yield RowRange(
                sources[number], max(first - offset, 0), min(last, int(ends[number])) - offset
            )


def read_slices(
    slices: Sequence[RowRange], wanted: Ints | None, rows: Ints | None = None
) -> Iterator[tuple[Ints, Floats32]]:
    """ids[n], vectors[n, D] of each slice; of `rows` only, counted over all slices, where they are given.

    One part is in memory at a time, and a part without such rows is not read. Raises RunError for a part that is
    missing or altered, and for vectors that are not finite.
    """
    first = 0
    for piece in slices:
        picked = (
            np.arange(len(piece))
            if rows is None
            else rows[(rows >= first) & (rows < first + len(piece))] - first
        )
        first += len(piece)
        if not len(picked):
            continue
        table = read_embedding_part(piece.source.folder, piece.source.part)
        kept = kept_rows(table.ids, wanted)[piece.start : piece.stop][picked]
        ids, vectors = table.ids[kept], table.vectors[kept]
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            raise RunError(
                f"{piece.source.uri}: the embedding of id {ids[bad[0]]} is not finite ({len(bad)} such);"
                f" remove {piece.source.folder} and embed it anew, from a checkpoint that is finite"
            )
        yield ids, vectors


def merge_found(found: Sequence[Found], k: int) -> Found:
    """The k best of several answers ids[M, n], scores[M, n] to the same queries: by score, ties by lower id.

    This is the one merge rule of the index. n may differ between answers; columns are fewer than k when all have
    fewer together.
    """
    ids = np.concatenate([ids for ids, _ in found], axis=1)
    scores = np.concatenate([scores for _, scores in found], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=1)
    # a tie anywhere down to place k + 1 may change who is in; few rows have one, and sorting by two keys is slow
    tied = np.flatnonzero((ranked[:, 1 : k + 1] == ranked[:, :-1][:, :k]).any(axis=1))
    order[tied] = np.lexsort((ids[tied], -scores[tied]), axis=1)
    order = order[:, :k]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)
