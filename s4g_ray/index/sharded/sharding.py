"""Decide, without Ray, what each shard holds and which input is refused.

A shard holds ranges of the references' kept rows: the rows of published embedding tables, row group
by row group, whose ids the index is restricted to (all rows without a restriction).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from s4g_ray.amounts import count_noun
from s4g_ray.arrays import Floats32, Ints
from s4g_ray.data.tables.embedding_table import open_embeddings, read_groups
from s4g_ray.errors import RunError
from s4g_ray.row_lookup import rows_of
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, Stamp

# pieces of a shard at least. A query's neighbors, and the lists that it visits, lie in few places:
# the pieces must be smaller than that to share its work
DEALS_PER_SHARD = 64
READ_AHEAD = 2  # reads while the rows of another one are added
READ_ROWS = 16_384


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
    """Rows start..stop of a row group of a part, counted among the group's kept rows.

    Kept rows keep the part's order; `first`: number of the first one among those of all tables.
    """

    source: TablePart
    group: int
    start: int
    stop: int
    first: int

    def __len__(self) -> int:
        return self.stop - self.start


class PartCount(NamedTuple):
    """Number of kept rows of each row group of a part, and D and type of its vectors."""

    kept: tuple[int, ...]
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


def fingerprint_ids(ids: Ints | None) -> str | None:
    """Return a fingerprint of ids in any order; None for all ids of a table."""
    if ids is None:
        return None
    return files.fingerprint(np.sort(np.asarray(ids, dtype=np.int64)).tobytes())


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


def deal_rows(
    sources: Sequence[TablePart], counts: Sequence[Sequence[int]], num_shards: int
) -> list[list[RowRange]]:
    """Deal the kept rows to shards so that each holds a like sample of them.

    counts[P][G]: the kept rows of each row group of each part. Tables are in the order of places,
    so rows that lie together look alike: each row group, cut where it is more than a
    1 / DEALS_PER_SHARD of a shard, goes to the shard with the fewest rows. A shard reads only its
    own row groups, and sizes differ by one piece at most. Raises RunError for fewer rows than
    shards.
    """
    total = sum(sum(groups) for groups in counts)
    if total < num_shards:
        raise RunError(
            f"{count_noun(total, 'reference')} cannot fill mining.num_shards={num_shards}; lower it"
            f" to at most {total}"
        )
    limit = max(1, total // (num_shards * DEALS_PER_SHARD))
    shares: list[list[RowRange]] = [[] for _ in range(num_shards)]
    fewest_first = [(0, shard) for shard in range(num_shards)]
    for piece in _cut_groups(sources, counts, limit):
        num_rows, shard = fewest_first[0]
        heapq.heapreplace(fewest_first, (num_rows + len(piece), shard))
        shares[shard].append(piece)
    return shares


def _cut_groups(
    sources: Sequence[TablePart], counts: Sequence[Sequence[int]], limit: int
) -> Iterator[RowRange]:
    """Yield the row groups in order, cut into near-equal pieces of at most `limit` kept rows."""
    first = 0
    for source, groups in zip(sources, counts, strict=True):
        for group, num_rows in enumerate(groups):
            num_pieces = -(-num_rows // limit)
            for piece in range(num_pieces):
                start = num_rows * piece // num_pieces
                stop = num_rows * (piece + 1) // num_pieces
                yield RowRange(source, group, start, stop, first + start)
            first += num_rows


def pick_rows(ranges: Sequence[RowRange], rows: Ints) -> Ints:
    """Return those of rows[n] (ascending, counted over all tables) that lie in the ranges."""
    picked = [_rows_within(piece, rows) + piece.first for piece in ranges]
    return np.concatenate([np.zeros(0, dtype=np.int64), *picked])


def _rows_within(piece: RowRange, rows: Ints) -> Ints:
    first, last = np.searchsorted(rows, [piece.first, piece.first + len(piece)])
    return rows[first:last] - piece.first


def read_ranges(
    ranges: Sequence[RowRange], wanted: Ints | None, rows: Ints | None = None
) -> Iterator[tuple[Ints, Floats32]]:
    """Yield ids[n], vectors[n, D] of the ranges in order, or of `rows` alone (see pick_rows).

    Reads only the row groups that it needs, about READ_ROWS rows of one part at once. Raises
    RunError for a part that is missing or altered, and for vectors that are not finite.
    """
    needed = ranges if rows is None else [r for r in ranges if len(_rows_within(r, rows))]
    reading = _gather_reads(needed)
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        reads = deque(pool.submit(_read_pieces, p, wanted, rows) for p in reading[:READ_AHEAD])
        for pieces in reading[READ_AHEAD:]:
            found = reads.popleft().result()
            reads.append(pool.submit(_read_pieces, pieces, wanted, rows))
            yield found
            del found  # frees it while the next one is read
        while reads:
            yield reads.popleft().result()


def _gather_reads(ranges: Sequence[RowRange]) -> list[list[RowRange]]:
    """Gather ranges to be read at once: of one part, and READ_ROWS rows or whole row groups."""
    reads: list[list[RowRange]] = []
    num_rows = 0
    for piece in ranges:
        before = reads[-1][-1] if reads else None
        is_same_part = before is not None and before.source == piece.source
        is_same_group = before is not None and is_same_part and before.group == piece.group
        if not is_same_part or (num_rows + len(piece) > READ_ROWS and not is_same_group):
            reads.append([])
            num_rows = 0
        reads[-1].append(piece)
        num_rows += len(piece)
    return reads


def _read_pieces(
    pieces: Sequence[RowRange], wanted: Ints | None, rows: Ints | None
) -> tuple[Ints, Floats32]:
    """Read the ranges of one part: ids[n], vectors[n, D]."""
    source = pieces[0].source
    groups = list(dict.fromkeys(piece.group for piece in pieces))
    tables = dict(zip(groups, read_groups(source.folder, source.part, groups), strict=True))
    ids = []
    vectors = []
    for piece in pieces:
        table = tables[piece.group]
        kept = kept_rows(table.ids, wanted)[piece.start : piece.stop]
        if rows is not None:
            kept = kept[_rows_within(piece, rows)]
        ids.append(table.ids[kept])
        vectors.append(table.vectors[kept])
    found = np.concatenate(ids)
    values = np.concatenate(vectors)
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise RunError(
            f"{source.uri}: the embedding of id {found[bad[0]]} is not finite ({len(bad)} such);"
            f" remove {source.folder} and embed it anew, from a checkpoint that is finite"
        )
    return found, values
