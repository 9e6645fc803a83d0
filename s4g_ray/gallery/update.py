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

from s4g_ray.arrays import Floats64, Ints
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.tables.embedding_table import encode_part
from s4g_ray.errors import InputError
from s4g_ray.gallery.store.embedding import GalleryModel, embed_tiles
from s4g_ray.gallery.store.header import GalleryHeader
from s4g_ray.gallery.store.images import ImageStage, Staged
from s4g_ray.gallery.store.lease import Lease
from s4g_ray.gallery.store.source_tiles import (
    have_moved,
    merge_rows,
    refresh_rows,
    refuse_other_places,
)
from s4g_ray.gallery.store.tiles import SCHEMA, read_tiles, write_tiles
from s4g_ray.gallery.store.vectors import (
    build_index,
    load_index,
    needs_new_plan,
    read_segment,
    read_vectors,
)
from s4g_ray.gallery.store.versions import (
    EMBEDDINGS,
    INDEX,
    Version,
    open_version,
    prune_versions,
    publish_version,
    version_folder,
)
from s4g_ray.index.vector_index import VectorIndex
from s4g_ray.progress import Reporter
from s4g_ray.row_lookup import rows_of
from s4g_ray.storage import files
from s4g_ray.storage.manifest import is_published, publish, write_part
from s4g_ray.storage.part_commits import WORK

MARKER = "update.json"  # in the folder of a version's work: what it is made from
MAX_SEGMENTS = 8  # embedding tables that a version needs; more are written as one


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
        if header.current:
            self._old = open_version(gallery, header.current)
            self._rows = read_tiles(self._old.folder, self._old.parts)

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

    def put(self, table: pa.Table, source: dict[str, Any]) -> UpdateReport:
        """Add the tiles of a data set, or put them in place of those of the same id.

        table: as read_source_tiles gives it; source: name, uri and fingerprint of the data set.
        """
        refuse_other_places(self._gallery, self._rows, table)
        key = self._claim({"source": source, "action": "put"})
        finished = self._finish_published()
        if finished is not None:
            return finished
        staged = self._stage(table, key)
        changed, vectors, bad = self._embed(staged)
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
        if self._old is not None and rows.equals(self._rows.combine_chunks()):
            self._lease.check()
            files.remove(self._folder)
            report.version = self._header.current
            report.num_tiles = len(rows)
            return self._timed(report)
        if not len(rows):
            raise InputError(f"none of the {len(table)} images can be read: {report.bad_images[0]}")
        index, recall = self._change_index(rows, refreshed, changed, vectors)
        sources = (*self._header.sources, {**source, "tiles": len(table)})
        return self._publish(rows, index, recall, report, key, _latest_sources(sources))

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
        index = load_index(self._old.index_folder)
        index.remove(ids)
        report = UpdateReport(version=self._number, num_tiles=len(rows), removed=len(ids))
        recall = self._old.info.get("recall")
        return self._publish(rows, index, recall, report, key, self._header.sources)

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
        elif files.exists(marker) and files.read_json(marker).get("key") == key:
            self._reporter.line(f"resuming version {self._number} of {self._gallery}")
            return key
        files.remove(self._folder)  # of an update that nobody ends
        files.write_json(marker, {"key": key, **values})
        return key

    def _finish_published(self) -> UpdateReport | None:
        """Name a version that is published, where only gallery.json was not written yet."""
        if not is_published(self._folder):
            return None
        info = open_version(self._gallery, self._number).info
        header = dict(info["header"])
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

    def _embed(self, staged: Staged) -> tuple[pa.Table, np.ndarray[Any, Any], tuple[str, ...]]:
        """Embed the staged images -> rows and vectors[n, D] by ascending id, and the bad images."""
        changed = staged.table.take(pa.array(np.argsort(staged.table["id"].to_numpy())))
        dim = self._model.dim
        if not len(changed):
            return changed, np.zeros((0, dim), np.float32), ()
        report = embed_tiles(
            self._model,
            self._gallery,
            self._folder,
            changed,
            self._header.dtype,
            self._reporter,
            self._lease,
        )
        for line in report.lines("tiles"):
            self._reporter.line(line)
        table = read_segment(self._gallery, self._number)
        order = np.argsort(table.ids)
        ids = table.ids[order]
        rows = rows_of(changed["id"].to_numpy(), ids)
        return changed.take(pa.array(rows)), table.vectors[order], report.bad_images

    def _change_index(
        self, rows: pa.Table, refreshed: pa.Table, changed: pa.Table, vectors: Any
    ) -> tuple[VectorIndex, float | None]:
        """Return the index of rows, and its recall; changed are the rows of vectors[n, D]."""
        with self._reporter.stage("building the index"):
            if self._old is None:
                return build_index(
                    self._config.mining, vectors, rows["id"].to_numpy(), _positions(rows)
                )
            index = load_index(self._old.index_folder)
            if needs_new_plan(index, len(rows)):
                found = read_vectors(
                    self._gallery,
                    rows["embedded_in"].to_numpy(),
                    rows["id"].to_numpy(),
                    self._model.dim,
                )
                return build_index(
                    self._config.mining, found, rows["id"].to_numpy(), _positions(rows)
                )
            moved = refreshed.filter(pa.array(have_moved(self._rows, refreshed)))
            if len(moved):
                moved_ids = moved["id"].to_numpy()
                segments = moved["embedded_in"].to_numpy()
                found = read_vectors(self._gallery, segments, moved_ids, self._model.dim)
                index.replace(found, moved_ids, _positions(moved))
            if len(changed):
                index.replace(vectors, changed["id"].to_numpy(), _positions(changed))
            return index, self._old.info.get("recall")

    def _publish(
        self,
        rows: pa.Table,
        index: VectorIndex,
        recall: float | None,
        report: UpdateReport,
        key: str,
        sources: tuple[dict[str, Any], ...],
    ) -> UpdateReport:
        self._lease.check()
        rows = self._join_segments(rows)
        parts = write_tiles(self._folder, rows, self._lease.token)
        index_name = f"{INDEX}/{self._lease.token}"
        index.save(files.join(self._folder, index_name))
        report.num_tiles = len(rows)
        report = self._timed(report)
        header = dataclasses.replace(
            self._header,
            current=self._number,
            num_tiles=len(rows),
            sources=sources,
            updated=now(),
        )
        images = sorted(set(rows["uri"].to_pylist())) if self._header.copies_images else []
        segments = np.unique(rows["embedded_in"].to_numpy()).tolist()
        info = {
            "key": key,
            "recall": recall,
            "change": report.as_dict(),
            "header": dataclasses.asdict(header),
        }
        stamp = self._model.stamp("", self._header.dtype)
        self._lease.check()
        publish_version(
            self._gallery, self._number, parts, stamp, segments, images, index_name, info
        )
        self._put_in_service(header)
        return report

    def _put_in_service(self, header: GalleryHeader) -> None:
        self._lease.check()
        header.save(self._gallery)
        files.remove(files.join(self._folder, WORK))
        prune_versions(self._gallery, self._number)

    def _join_segments(self, rows: pa.Table) -> pa.Table:
        """Write all embeddings as one table of this version, where they lie in many."""
        segments = rows["embedded_in"].to_numpy()
        if len(np.unique(segments)) <= MAX_SEGMENTS:
            return rows
        ids = rows["id"].to_numpy()
        vectors = read_vectors(self._gallery, segments, ids, self._model.dim)
        folder = files.join(self._folder, EMBEDDINGS)
        files.remove(folder)
        data = encode_part(ids, rows["place_id"].to_numpy(), vectors, self._header.dtype)
        part = write_part(folder, "references/part-00000.parquet", data, len(ids))
        stamp = self._model.stamp("", self._header.dtype)
        publish(folder, "embeddings", [part], stamp, {"splits": ["gallery"], "bad_images": []})
        column = SCHEMA.get_field_index("embedded_in")
        values = pa.array(np.full(len(rows), self._number, np.int32))
        return rows.set_column(column, SCHEMA.field("embedded_in"), values)

    def _timed(self, report: UpdateReport) -> UpdateReport:
        report.seconds = round(time.perf_counter() - self._started, 3)
        return report


def _positions(rows: pa.Table) -> Floats64:
    """Return lat and lon [N, 2]."""
    return np.stack([rows["lat"].to_numpy(), rows["lon"].to_numpy()], axis=1)


def _latest_sources(sources: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """Return the latest entry of the same splits of a data set's URI."""
    latest = {(source["uri"], json.dumps(source["splits"])): source for source in sources}
    return tuple(latest.values())
