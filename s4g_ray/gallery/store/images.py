"""Find new and changed images by their bytes, and copy them into tar shards of a gallery.

Images are read in the order in which they are stored. Each shard is committed with its rows, so
that an interrupted job resumes after the last one.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from s4g_ray.arrays import Ints
from s4g_ray.errors import BadImageError, StoreError
from s4g_ray.gallery.store.header import IMAGES
from s4g_ray.gallery.store.tiles import DIGEST_BYTES, SCHEMA, encode_table, read_rows
from s4g_ray.progress import Update
from s4g_ray.row_lookup import rows_of
from s4g_ray.storage import files
from s4g_ray.storage.byte_ranges import Range, read_ranges
from s4g_ray.storage.manifest import Part, write_part
from s4g_ray.storage.ownership.lease import Lease
from s4g_ray.storage.part_commits import WORK, read_commit, write_commit
from s4g_ray.storage.tar_writer import TarWriter

SHARD_BYTES = 64_000_000  # of a shard, at least; the last may be smaller
READ_AT_ONCE = 512  # images whose bytes are in memory together
SUFFIXES = (
    (b"\xff\xd8", "jpg", "image/jpeg"),
    (b"\x89PNG", "png", "image/png"),
    (b"GIF8", "gif", "image/gif"),
    (b"II*\0", "tif", "image/tiff"),
    (b"MM\0*", "tif", "image/tiff"),
    (b"BM", "bmp", "image/bmp"),
)


def describe_bytes(data: bytes) -> tuple[str, str]:
    """Return the suffix and the content type of an image file, by its first bytes."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp", "image/webp"
    for start, suffix, content_type in SUFFIXES:
        if data.startswith(start):
            return suffix, content_type
    return "bin", "application/octet-stream"


def is_copied(uri: str) -> bool:
    """Return whether a tile's uri names a file of the gallery's folder images/."""
    folder, _, name = uri.partition("/")
    return folder == IMAGES and name not in ("", ".", "..") and not set(name) & set("/\\")


@dataclass
class Staged:
    """The outcome of stage_images."""

    table: pa.Table  # SCHEMA's rows of new and changed images, with their new locations
    num_read: int  # images
    bytes_read: int
    bytes_copied: int
    bad: list[str] = field(default_factory=list)  # why each image that is left out has no bytes
    bad_ids: list[int] = field(default_factory=list)
    num_reused: int = 0  # rows that an interrupted job had committed


@dataclass(frozen=True)
class Shard:
    """A committed shard: its file (None: images are not copied), its rows, and where to go on."""

    rows: Part | None
    images: Part | None
    next_row: int
    num_bytes: int  # read, since the shard before
    bad: tuple[str, ...]
    bad_ids: tuple[int, ...]

    @classmethod
    def from_row(cls, value: Any) -> Shard:
        """Restore it from the dictionary that dataclasses.asdict made of it."""
        return cls(
            rows=Part(**value["rows"]) if value["rows"] else None,
            images=Part(**value["images"]) if value["images"] else None,
            next_row=int(value["next_row"]),
            num_bytes=int(value["num_bytes"]),
            bad=tuple(value["bad"]),
            bad_ids=tuple(value["bad_ids"]),
        )


class ImageStage:
    """Stages the images of one version. known_ids[N], ascending, have known_digests[N]."""

    def __init__(
        self,
        gallery: str,
        folder: str,
        number: int,
        key: str,
        known_ids: Ints,
        known_digests: pa.ChunkedArray,
        lease: Lease,
        *,
        copies: bool,
        skip_bad: bool,
    ) -> None:
        self._gallery = gallery
        self._folder = folder
        self._number = number
        self._key = key
        self._known_ids = known_ids
        self._known_digests = known_digests
        self._lease = lease
        self._copies = copies
        self._skip_bad = skip_bad

    def run(self, table: pa.Table, on_progress: Update) -> Staged:
        """Read the images of a table of SCHEMA's rows; stage those with other bytes than known.

        Raises BadImageError for an image without bytes, unless bad ones are skipped; and
        OwnershipLostError when the lease is lost.
        """
        order = pc.sort_indices(table, sort_keys=[("uri", "ascending"), ("offset", "ascending")])
        table = table.take(order)
        known = self._take_known(table["id"].to_numpy())
        staged = Staged(SCHEMA.empty_table(), 0, 0, 0)
        tables: list[pa.Table] = []
        start = 0
        number = 0
        while start < len(table):
            shard = self._find(number)
            is_reused = shard is not None
            if shard is None:
                shard = self._stage_shard(table, known, start, number, on_progress)
            if shard.rows is not None:
                tables.append(read_rows(self._folder, shard.rows))
                staged.num_reused += shard.rows.rows * is_reused
            if shard.images is not None:
                staged.bytes_copied += shard.images.num_bytes
            staged.bytes_read += shard.num_bytes
            staged.bad.extend(shard.bad)
            staged.bad_ids.extend(shard.bad_ids)
            start = shard.next_row
            number += 1
            on_progress(start, len(table))
        staged.num_read = len(table)
        if tables:
            staged.table = pa.concat_tables(tables)
        return staged

    def _take_known(self, ids: Ints) -> list[bytes | None]:
        """Return the known digest of each id, None for new ones."""
        rows = rows_of(self._known_ids, ids)
        indices = pa.array(rows, mask=rows < 0)
        found: list[bytes | None] = self._known_digests.take(indices).to_pylist()
        return found

    def _commit_uri(self, number: int) -> str:
        return files.join(self._folder, WORK, f"images-{number:05d}.json")

    def _find(self, number: int) -> Shard | None:
        def files_of(shard: Shard) -> Iterator[tuple[str, Part | None]]:
            yield self._folder, shard.rows
            yield self._gallery, shard.images

        return read_commit(self._commit_uri(number), self._key, Shard.from_row, files_of)

    def _stage_shard(
        self,
        table: pa.Table,
        known: list[bytes | None],
        start: int,
        number: int,
        on_progress: Update,
    ) -> Shard:
        """Read images from row `start` until a shard is full, then write and commit it."""
        name = f"{IMAGES}/v={self._number:04d}-{self._lease.token}-{number:05d}.tar"
        writer = _ShardWriter(name, self._copies)
        row = start
        num_bytes = 0
        bad: list[tuple[int, str]] = []
        while row < len(table) and writer.num_bytes < SHARD_BYTES:
            batch = table.slice(row, READ_AT_ONCE)
            contents = read_ranges(_ranges_of(batch))
            ids = batch["id"].to_pylist()
            for i, data in enumerate(contents):
                if isinstance(data, Exception):
                    bad.append((ids[i], self._describe_bad(ids[i], data)))
                    continue
                num_bytes += len(data)
                digest = hashlib.sha256(data).digest()[:DIGEST_BYTES]
                if digest != known[row + i]:
                    writer.add(row + i, ids[i], data, digest)
            row += len(batch)
            on_progress(row, len(table))
        self._lease.check()
        rows, images = self._write(table, writer, number)
        shard = Shard(
            rows=rows,
            images=images,
            next_row=row,
            num_bytes=num_bytes,
            bad=tuple(reason for _, reason in bad),
            bad_ids=tuple(bad_id for bad_id, _ in bad),
        )
        write_commit(self._commit_uri(number), self._key, shard)
        return shard

    def _describe_bad(self, tile_id: int, error: Exception) -> str:
        """Return the reason of an image without bytes. Raises BadImageError where none may lack."""
        if isinstance(error, StoreError):
            raise error
        reason = f"id {tile_id}: {error}"
        if not self._skip_bad:
            raise BadImageError(f"{reason}; fix the image, or set data.on_bad_image=skip")
        return reason

    def _write(
        self, table: pa.Table, writer: _ShardWriter, number: int
    ) -> tuple[Part | None, Part | None]:
        """Write a shard's rows and images -> their files, None where there are none."""
        if not writer.rows:
            return None, None
        rows = table.take(pa.array(writer.rows))
        images = None
        if self._copies:
            data = writer.finish()
            images = write_part(self._gallery, writer.name, data, len(rows))
            rows = _replace(rows, "uri", pa.array([writer.name] * len(rows)))
            rows = _replace(rows, "offset", pa.array(writer.offsets, pa.int64()))
            rows = _replace(rows, "length", pa.array(writer.lengths, pa.int64()))
        rows = _replace(rows, "digest", pa.array(writer.digests, pa.binary(DIGEST_BYTES)))
        rows = _replace(rows, "embedded_in", pa.array([self._number] * len(rows), pa.int32()))
        name = f"{WORK}/images-{number:05d}.parquet"
        return write_part(self._folder, name, encode_table(rows), len(rows)), images


class _ShardWriter:
    """A tar shard in memory, and the rows of its members; without copies the rows alone."""

    def __init__(self, name: str, copies: bool) -> None:
        self.name = name
        self.rows: list[int] = []
        self.offsets: list[int] = []
        self.lengths: list[int] = []
        self.digests: list[bytes] = []
        self.num_bytes = 0
        self._file = io.BytesIO()
        self._tar = TarWriter(self._file) if copies else None

    def add(self, row: int, tile_id: int, data: bytes, digest: bytes) -> None:
        """Append an image."""
        self.rows.append(row)
        self.digests.append(digest)
        if self._tar is None:
            self.num_bytes += len(data)  # a shard's rows are committed alike
            return
        member = self._tar.add(f"{tile_id}.{describe_bytes(data)[0]}", data)
        self.offsets.append(member.offset)
        self.lengths.append(member.length)
        self.num_bytes = self._tar.num_bytes

    def finish(self) -> bytes:
        """Return the bytes of the tar file."""
        assert self._tar is not None
        self._tar.close()
        return self._file.getvalue()


def _ranges_of(table: pa.Table) -> list[Range]:
    columns = (table[name].to_pylist() for name in ("uri", "offset", "length"))
    return list(zip(*columns, strict=True))


def _replace(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    number = SCHEMA.get_field_index(name)
    return table.set_column(number, SCHEMA.field(name), values)
