"""Encode the blocks of a table, commit each, and join them to parts: what an actor does.

Imports no Ray. Two blocks may be in work at once: one is encoded while the next is decoded.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from s4g_ray.arrays import Floats32, Ints, Rows32
from s4g_ray.config.training_schema import ModelConfig
from s4g_ray.data.image_table import ImageTable, View
from s4g_ray.data.images import load_pixels
from s4g_ray.data.tables.embedding_table import encode_part, join_parts
from s4g_ray.data.tables.node_cache import open_image_tables
from s4g_ray.encoder.embedding.decode_ahead import DecodeAhead, DecodedBatch
from s4g_ray.encoder.embedding.encode_batches import BatchEncoder
from s4g_ray.encoder.embedding.outcomes import BlockResult, EncodingJob, Written, rows_key
from s4g_ray.encoder.embedding.part_plan import Block, PlannedPart, digest_rows
from s4g_ray.errors import BadImageError, GpuMemoryError, RunError, first_line, is_out_of_memory
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, read_part, write_part
from s4g_ray.storage.part_commits import WORK, read_commit, write_commit

KEPT_TABLES = 2  # data sets and splits whose image tables stay open
Tables = Mapping[View, ImageTable]


class StoppedError(RunError):
    """The job has ended, and nobody waits for its blocks."""


class BlockEncoder:
    """Encode blocks with one encoder, whose weights are read when they differ from the last job's.

    num_threads: of torch; num_decoders: threads that read and decode, at most decode_ahead_bytes of
    pixels ahead.
    """

    def __init__(
        self,
        model: ModelConfig,
        num_threads: int,
        num_decoders: int,
        decode_ahead_bytes: int,
        device: torch.device,
    ) -> None:
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self._encoder = BatchEncoder(model, device)
        is_gpu = device.type == "cuda"
        self._decoder = DecodeAhead(num_decoders, decode_ahead_bytes, pin=is_gpu)
        self._thread = ThreadPoolExecutor(
            1, "encoder", initializer=torch.set_num_threads, initargs=(num_threads,)
        )
        self._tables: OrderedDict[tuple[object, ...], Tables] = OrderedDict()
        self._opening = threading.Lock()
        self._done: dict[str, int] = {}  # images encoded of each block in work
        self._stopped = ""  # token of the last job that has ended

    def progress(self) -> dict[str, int]:
        """Return the number of images encoded of each block in work, by the block's name."""
        return dict(self._done)

    def stop(self, token: str) -> None:
        """End the blocks of a job after their batch in progress."""
        self._stopped = token

    def release_memory(self) -> None:
        """Free the GPU memory that torch caches, and the buffers of decoded images."""
        self._decoder.buffers.clear()
        self._thread.submit(self._encoder.release_memory).result()

    def find_part(self, job: EncodingJob, part: PlannedPart) -> Written | None:
        """Return what an interrupted job committed of a whole part from the same inputs, if it did.

        Raises BadImageError as encode does.
        """
        table = self._take(job, part.view, part.rows)
        key = rows_key(job.key, part.view, table)
        return self._find_commit(job, part.view, table, key, part.name)

    def encode(self, job: EncodingJob, block: Block) -> BlockResult:
        """Encode a block's images, write and commit it; or reuse it, where it is committed.

        Raises RunError for embeddings that are not finite, for a checkpoint or data set that was
        altered meanwhile, and StoppedError; GpuMemoryError where the GPU has no memory for a batch;
        BadImageError for the first corrupt image when `data.on_bad_image` is `fail`.
        """
        self._check_wanted(job, block)
        table = self._take(job, block.view, block.rows)
        if digest_rows(table.ids, table.place_ids) != block.digest:
            raise RunError(f"{job.data.uri} was changed while it was embedded; start again")
        name = f"{WORK}/{block.name}.parquet"
        key = rows_key(job.key, block.view, table)
        if job.resumes:
            kept = self._find_commit(job, block.view, table, key, block.name)
            if kept is not None:
                now = time.time()
                return BlockResult(kept, len(table), self.name, now, now, reused=True)
        self._thread.submit(self._encoder.load, job).result()
        started = time.time()
        with self._counted(block.name):
            rows, vectors, bad = self._embed(job, block, table)
        _check_finite(vectors, table.ids[rows], job, block)
        part = None
        if len(rows):
            data = encode_part(table.ids[rows], table.place_ids[rows], vectors, job.dtype)
            part = write_part(job.target, name, data, len(rows))
        bad_ids = tuple(int(table.ids[row]) for row, _ in bad)
        written = Written(part, bad_ids, tuple(str(error) for _, error in bad))
        write_commit(_commit_uri(job, block.name), key, written)
        return BlockResult(written, len(table), self.name, started, time.time())

    def join(self, job: EncodingJob, part: PlannedPart, blocks: list[Written]) -> Written:
        """Join the written blocks of a part, write and commit it, and remove them.

        Repeated after a death, it may find its part committed, and the blocks removed. Raises
        RunError for a block that is missing or altered.
        """
        table = self._take(job, part.view, part.rows)
        key = rows_key(job.key, part.view, table)
        committed = self._find_commit(job, part.view, table, key, part.name)
        if committed is not None:
            return committed
        bad_ids = tuple(row for block in blocks for row in block.bad_ids)
        bad = tuple(reason for block in blocks for reason in block.bad)
        found: Part | None = None
        num_rows = sum(block.num_rows for block in blocks)
        if num_rows:
            pieces = [read_part(job.target, block.part) for block in blocks if block.part]
            found = write_part(job.target, part.name, join_parts(pieces), num_rows)
        written = Written(found, bad_ids, bad)
        write_commit(_commit_uri(job, part.name), key, written)
        files.remove(files.join(job.target, WORK, part.name.removesuffix(".parquet")))
        return written

    def _check_wanted(self, job: EncodingJob, block: Block) -> None:
        if self._stopped == job.token:
            raise StoppedError(f"{block.name} was given up: its job has ended")

    def _take(self, job: EncodingJob, view: View, rows: Rows32) -> ImageTable:
        """Return the rows of a view's image table; the tables stay open for later blocks."""
        images = job.data.image_options
        opened = (job.data.uri, images, job.fingerprint, tuple(sorted(job.splits.items())))
        with self._opening:
            if opened not in self._tables:
                tables = open_image_tables(
                    job.data.uri, dict(job.splits), job.data.cache_dir, images
                )
                self._tables[opened] = tables
            while len(self._tables) > KEPT_TABLES:
                self._tables.popitem(last=False)
            table = self._tables[opened][view]
        if len(rows) and rows.max() >= len(table):
            raise RunError(f"{job.data.uri} was changed while it was embedded; start again")
        return table.take(rows.astype(np.int64))

    def _find_commit(
        self, job: EncodingJob, view: View, table: ImageTable, key: str, name: str
    ) -> Written | None:
        """Return what is committed of some rows; None too where an image was repaired since."""
        kept = read_commit(
            _commit_uri(job, name), key, Written.from_row, lambda found: [(job.target, found.part)]
        )
        if kept is None or not kept.bad_ids:
            return kept
        rows = table.rows(np.array(kept.bad_ids)).tolist()
        for image in load_pixels(table, rows, view, job.data, seed=job.seed):
            if not isinstance(image, BadImageError):
                return None
            if job.data.on_bad_image == "fail":
                raise image
        return kept

    def _embed(
        self, job: EncodingJob, block: Block, table: ImageTable
    ) -> tuple[Ints, Floats32, list[tuple[int, BadImageError]]]:
        """Return rows[n] of a block in its order, vectors[n, D] of them, and the bad images."""
        batches = self._decoder.batches(
            table,
            order_of_files(table),
            block.view,
            job.data,
            seed=job.seed,
            batch_size=job.batch_size,
        )
        rows: list[Ints] = []
        bad: list[tuple[int, BadImageError]] = []
        passes: list[tuple[Future[Tensor], DecodedBatch]] = []
        try:
            for batch in batches:
                passes.append((self._thread.submit(self._encode_batch, job, block, batch), batch))
                rows.append(batch.rows)
                bad.extend(batch.bad)
                if bad and job.data.on_bad_image == "fail":
                    raise bad[0][1]
                for future, _ in passes:
                    if future.done():
                        future.result()  # raises its error
                self._check_wanted(job, block)
            # not in the encoder's thread, which passes the next block to a GPU meanwhile
            vectors = self._encoder.collect([future.result() for future, _ in passes])
        except RuntimeError as error:
            if isinstance(error, RunError) or not is_out_of_memory(error):
                raise
            num_images = min(job.batch_size, len(table))
            raise GpuMemoryError(_describe_full_gpu(num_images, error)) from error
        finally:
            batches.close()
            for future, batch in passes:
                if future.cancel():
                    self._decoder.buffers.give_back(batch.buffer)
            wait([future for future, _ in passes])
        found = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
        order = np.argsort(found)
        return found[order], vectors[order], sorted(bad, key=lambda one: one[0])

    def _encode_batch(self, job: EncodingJob, block: Block, batch: DecodedBatch) -> Tensor:
        try:
            return self._encoder.embed(job.numerics, batch.images, block.view)
        finally:
            self._decoder.buffers.give_back(batch.buffer)
            done = self._done.get(block.name, 0)
            self._done[block.name] = done + len(batch.rows) + len(batch.bad)

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        self._done[name] = 0
        try:
            yield
        finally:
            self._done.pop(name, None)  # two calls for one block: its first actor seemed lost


def order_of_files(table: ImageTable) -> Ints:
    """Return the rows in the order in which their images are stored, so that reads are few."""
    if table.uris.codes is None:
        return np.arange(len(table))
    return np.lexsort((table.offsets, table.uris.codes))


def _commit_uri(job: EncodingJob, name: str) -> str:
    return files.join(job.target, WORK, f"{name}.json")


def _describe_full_gpu(num_images: int, error: Exception) -> str:
    """Return the message of a batch that finds no memory on its GPU, with torch's reason."""
    return (
        f"an embedding actor has no GPU memory for a batch of {num_images}"
        " images: lower embedding.batch_size, or have fewer actors and workers share a GPU (raise"
        " embedding.gpus_per_actor, lower embedding.num_actors or train.micro_batch_size), and"
        f" resume; torch says: {first_line(error)}"
    )


def _check_finite(vectors: Floats32, ids: Ints, job: EncodingJob, block: Block) -> None:
    """Raise RunError with the id of the first embedding that is not finite."""
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise RunError(
            f"the embedding of {block.view} id {ids[bad[0]]} is not finite ({len(bad)} such in"
            f" {block.name}), computed with {job.checkpoint}"
        )
