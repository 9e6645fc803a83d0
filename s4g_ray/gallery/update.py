"""Write the next version of a gallery: stage images, embed, change the index, publish.

Everything lies in the folder of the new version until its manifest is written; gallery.json then
names it. An interrupted update of the same inputs resumes; one of other inputs is removed.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.format.image_paths import are_whole, relate
from s4g_ray.data.tables.embedding_table import encode_part
from s4g_ray.errors import InputError, RunError
from s4g_ray.gallery.store.embedding import GalleryModel, embed_tiles
from s4g_ray.gallery.store.header import GalleryHeader
from s4g_ray.gallery.store.images import ImageStage, Staged
from s4g_ray.gallery.store.index_facts import IndexFacts
from s4g_ray.gallery.store.index_writer import IndexWriter, needs_new_plan, settings_of
from s4g_ray.gallery.store.source_tiles import (
    have_moved,
    merge_rows,
    refresh_rows,
    refuse_other_places,
    shorten_paths,
)
from s4g_ray.gallery.store.tiles import SCHEMA, read_tiles, write_tiles
from s4g_ray.gallery.store.vectors import read_embedded_ids, read_vectors
from s4g_ray.gallery.store.versions import (
    EMBEDDINGS,
    INDEX,
    KEY,
    Version,
    open_version,
    prune_versions,
    publish_version,
    version_folder,
)
from s4g_ray.progress import Reporter
from s4g_ray.row_lookup import rows_of
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, is_published, publish, write_part
from s4g_ray.storage.ownership.lease import Lease
from s4g_ray.storage.part_commits import WORK

MARKER = "update.json"  # in the folder of a version's work: what it is made from
MAX_SEGMENTS = 8  # embedding tables that a version needs; more are written as one
READ_VALUES = 2**27  # of embeddings that are in memory together when they are: 0.5 GB


@dataclass
class UpdateReport:
    """Counts of an update."""

    version: int
    num_tiles: int  # in the gallery, afterwards
    added: int = 0
    changed: int = 0  # with other bytes than before
    unchanged: int = 0
    removed: int = 0
    num_read: int = 0  # images whose bytes were read
    bytes_read: int = 0
    bytes_copied: int = 0
    encoded: int = 0  # images
    bad_images: tuple[str, ...] = ()
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as JSON has them."""
        return {**dataclasses.asdict(self), "bad_images": list(self.bad_images)}


def now() -> str:
    """Return the time as ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class GalleryUpdate:
    """One change of a gallery, by the holder of its lease.

    header: of the gallery as it is, or as it will be where it has no version yet (current 0).
    """

    def __init__(
        self,
        gallery: str,
        header: GalleryHeader,
        model: GalleryModel,
        lease: Lease,
        reporter: Reporter,
    ) -> None:
        self._gallery = gallery
        self._header = header
        self._model = model
        self._lease = lease
        self._reporter = reporter
        self._started = time.perf_counter()
        self._number = header.current + 1
        self._folder = version_folder(gallery, self._number)
        self._old: Version | None = None
        self._rows = SCHEMA.empty_table()
        # the embedding table of each version, relative to the gallery
        self._tables: dict[int, str] = {}
        if header.current:
            self._old = open_version(gallery, header.current)
            self._rows = read_tiles(self._old.folder, self._old.parts)
            self._tables = dict(self._old.segments)

    @property
    def _config(self) -> RunConfig:
        return self._model.config

    @property
    def ids(self) -> Ints:
        """The ids of the gallery as it is, ascending."""
        ids: Ints = self._rows["id"].to_numpy()
        return ids

    @property
    def rows(self) -> pa.Table:
        """The rows of the gallery as it is, by ascending id."""
        return self._rows

    def put(self, table: pa.Table, source: dict[str, Any], images_root: str) -> UpdateReport:
        """Add the tiles of a data set, or put them in place of those of the same id.

        table: as read_source_tiles gives it; source: name, uri and fingerprint of the data set;
        images_root: the absolute folder of its images. Where no tile depends on the gallery's own
        folder of images, that becomes the folder.
        """
        refuse_other_places(self._gallery, self._rows, table)
        key = self._claim({"source": source, "images_root": images_root, "action": "put"})
        has_relative = pc.any(pc.invert(are_whole(self._rows["uri"]))).as_py()
        if not self._header.copies_images and not has_relative:
            root = relate(self._gallery, images_root)
            self._header = dataclasses.replace(self._header, images_root=root)
        finished = self._finish_published()
        if finished is not None:
            return finished
        staged = self._stage(table, key)
        changed, bad = self._embed(staged)
        left_out = set(staged.bad_ids) | set(staged.table["id"].to_pylist())
        same_ids = np.array([one for one in table["id"].to_pylist() if one not in left_out], int)
        unchanged = table.take(rows_of(table["id"].to_numpy(), same_ids))
        refreshed = refresh_rows(self._rows, unchanged, copies_images=self._header.copies_images)
        report = UpdateReport(
            version=self._number,
            num_tiles=0,
            unchanged=len(refreshed),
            num_read=staged.num_read,
            bytes_read=staged.bytes_read,
            bytes_copied=staged.bytes_copied,
            encoded=len(changed),
            bad_images=(*staged.bad, *bad),
        )
        is_old = rows_of(self.ids, changed["id"].to_numpy()) >= 0
        report.changed = int(is_old.sum())
        report.added = len(changed) - report.changed
        rows = merge_rows(self._rows, refreshed, changed)
        if not self._header.copies_images:
            rows = shorten_paths(rows, self._gallery, self._header.find_images(self._gallery))
        if self._old is not None and rows.equals(self._rows.combine_chunks()):
            self._lease.check()
            files.remove(self._folder)
            report.version = self._header.current
            report.num_tiles = len(rows)
            return self._timed(report)
        if not len(rows):
            raise InputError(f"none of the {len(table)} images can be read: {report.bad_images[0]}")
        moved = refreshed.filter(pa.array(have_moved(self._rows, refreshed)))
        put = np.sort(np.concatenate([moved["id"].to_numpy(), changed["id"].to_numpy()]))
        sources = (*self._header.sources, {**source, "tiles": len(table)})
        no_ids = np.empty(0, np.int64)
        return self._publish(rows, put, no_ids, report, key, _latest_sources(sources))

    def remove(self, ids: Ints) -> UpdateReport:
        """Remove the tiles of ids[n], ascending, which the gallery has."""
        assert self._old is not None
        digest = files.fingerprint(ids.tobytes())
        key = self._claim({"action": "remove", "ids": digest})
        finished = self._finish_published()
        if finished is not None:
            return finished
        kept = rows_of(ids, self.ids) < 0
        rows = self._rows.filter(pa.array(kept)).combine_chunks()
        report = UpdateReport(version=self._number, num_tiles=len(rows), removed=len(ids))
        return self._publish(rows, ids[:0], ids, report, key, self._header.sources)

    def _claim(self, inputs: dict[str, Any]) -> str:
        """Begin the folder of the version, or resume in it; return the key of the inputs."""
        values = {
            "inputs": inputs,
            "model": self._model.describe(),
            "copies_images": self._header.copies_images,
            "on_bad_image": self._config.data.on_bad_image,
            "base": self._header.current,
        }
        key = files.fingerprint(json.dumps(values, sort_keys=True).encode())
        marker = files.join(self._folder, WORK, MARKER)
        if is_published(self._folder):
            if open_version(self._gallery, self._number).info.get("key") == key:
                return key
        elif files.exists(marker):
            begun = files.read_json(marker)
            if begun.get("key") == key:
                self._reporter.line(f"resuming version {self._number} of {self._gallery}")
                self._tables[self._number] = self._table_named(str(begun["embeddings"]))
                return key
        files.remove(self._folder)  # of an update that nobody ends
        name = self._lease.token
        files.write_json(marker, {"key": key, "embeddings": name, **values})
        self._tables[self._number] = self._table_named(name)
        return key

    def _table_named(self, name: str) -> str:
        """Return the folder of an embedding table of this version, relative to the gallery."""
        return f"{KEY}={self._number:04d}/{EMBEDDINGS}/{name}"

    def _read(self, rows: pa.Table) -> Floats32:
        """Read the embeddings of rows -> vectors[n, D]."""
        return read_vectors(
            self._gallery,
            self._tables,
            rows["embedded_in"].to_numpy(),
            rows["id"].to_numpy(),
            self._model.dim,
        )

    def _finish_published(self) -> UpdateReport | None:
        """Name a version that is published, where only gallery.json was not written yet."""
        if not is_published(self._folder):
            return None
        info = open_version(self._gallery, self._number).info
        header = dict(info["header"])
        header["images_root"] = self._header.images_root  # it may have been given anew meanwhile
        self._put_in_service(GalleryHeader(**{**header, "sources": tuple(header["sources"])}))
        change = {**info["change"], "bad_images": tuple(info["change"]["bad_images"])}
        return self._timed(UpdateReport(**change))

    def _stage(self, table: pa.Table, key: str) -> Staged:
        stage = ImageStage(
            self._gallery,
            self._folder,
            self._number,
            key,
            self.ids,
            self._rows["digest"],
            self._lease,
            copies=self._header.copies_images,
            skip_bad=self._config.data.on_bad_image == "skip",
        )
        with self._reporter.stage("reading images") as update:
            return stage.run(table, update)

    def _embed(self, staged: Staged) -> tuple[pa.Table, tuple[str, ...]]:
        """Embed the staged images -> their rows by ascending id, and the bad images."""
        changed = staged.table.take(pa.array(np.argsort(staged.table["id"].to_numpy())))
        if not len(changed):
            return changed, ()
        table = files.join(self._gallery, self._tables[self._number])
        report = embed_tiles(
            self._model,
            self._gallery,
            self._folder,
            table,
            changed,
            self._header.dtype,
            self._reporter,
            self._lease,
        )
        for line in report.lines("tile"):
            self._reporter.line(line)
        rows = rows_of(changed["id"].to_numpy(), read_embedded_ids(table))
        return changed.take(pa.array(rows)), report.bad_images

    def _write_index(
        self, rows: pa.Table, put: Ints, removed: Ints, name: str
    ) -> tuple[pa.Table, IndexFacts]:
        """Write the index of all rows into a folder of the version; put, removed: ids, ascending.

        Returns the rows too: their embeddings may be written as one table.
        """
        is_replanned = self._old is not None and needs_new_plan(self._old, len(rows))
        num_segments = len(np.unique(rows["embedded_in"].to_numpy()))
        if is_replanned or num_segments > MAX_SEGMENTS:
            rows = self._join_segments(rows)
        folder = files.join(self._folder, name)
        writer = IndexWriter(
            self._config, folder, self._number, self._model.dim, self._read, self._reporter
        )
        with self._reporter.stage("building the index"):
            try:
                if self._old is None or is_replanned:
                    table = files.join(self._gallery, self._tables[self._number])
                    return rows, writer.build(rows, table)
                changed = rows.take(pa.array(rows_of(rows["id"].to_numpy(), put)))
                return rows, writer.change(self._old, changed, removed)
            except RunError:
                self._lease.check()  # a writer that took it over has removed this one's files
                raise

    def _publish(
        self,
        rows: pa.Table,
        put: Ints,
        removed: Ints,
        report: UpdateReport,
        key: str,
        sources: tuple[dict[str, Any], ...],
    ) -> UpdateReport:
        self._lease.check()
        index_name = f"{INDEX}/{self._lease.token}"
        rows, facts = self._write_index(rows, put, removed, index_name)
        self._lease.check()
        parts = write_tiles(self._folder, rows, self._lease.token)
        report.num_tiles = len(rows)
        report = self._timed(report)
        header = dataclasses.replace(
            self._header,
            current=self._number,
            num_tiles=len(rows),
            index=facts.summary(),
            index_settings=settings_of(self._config),
            sources=sources,
            updated=now(),
        )
        images = sorted(set(rows["uri"].to_pylist())) if self._header.copies_images else []
        needed = np.unique(rows["embedded_in"].to_numpy()).tolist()
        segments = {number: self._tables[number] for number in needed}
        info = {
            "key": key,
            "change": report.as_dict(),
            "header": dataclasses.asdict(header),
        }
        stamp = self._model.stamp("", self._header.dtype)
        self._lease.check()
        publish_version(
            self._gallery, self._number, parts, stamp, segments, images, index_name, facts, info
        )
        self._put_in_service(header)
        return report

    def _put_in_service(self, header: GalleryHeader) -> None:
        self._lease.check()
        header.save(self._gallery)
        files.remove(files.join(self._folder, WORK))
        prune_versions(self._gallery, self._number)

    def _join_segments(self, rows: pa.Table) -> pa.Table:
        """Write the embeddings of all rows as one table of this version, a part at a time."""
        name = self._table_named(f"{self._lease.token}-joined")
        joined = files.join(self._gallery, name)
        parts: list[Part] = []
        for start in range(0, len(rows), max(1, READ_VALUES // self._model.dim)):
            block = rows.slice(start, max(1, READ_VALUES // self._model.dim))
            data = encode_part(
                block["id"].to_numpy(),
                block["place_id"].to_numpy(),
                self._read(block),
                self._header.dtype,
            )
            file = f"references/part-{len(parts):05d}.parquet"
            parts.append(write_part(joined, file, data, len(block)))
        stamp = self._model.stamp("", self._header.dtype)
        publish(joined, "embeddings", parts, stamp, {"splits": ["gallery"], "bad_images": []})
        self._tables[self._number] = name
        column = SCHEMA.get_field_index("embedded_in")
        values = pa.array(np.full(len(rows), self._number, np.int32))
        return rows.set_column(column, SCHEMA.field("embedded_in"), values)

    def _timed(self, report: UpdateReport) -> UpdateReport:
        report.seconds = round(time.perf_counter() - self._started, 3)
        return report


def _latest_sources(sources: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """Return the latest entry of the same splits of a data set's URI."""
    latest = {(source["uri"], json.dumps(source["splits"])): source for source in sources}
    return tuple(latest.values())
