"""Turn a collection of images and a checkpoint into an embedding table, with Ray Data.

The job streams *parts* of the collection. A loading task reads and decodes a part's images and
hands them to an actor of an EncoderPool, which encodes them and writes the part as Parquet. The
task then writes a small commit file, so that a restarted job keeps the part. The driver publishes
the table when all parts are written.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import ray.data
from ray.exceptions import RayError

from s4g_ray import __version__
from s4g_ray.config.data_schema import DataConfig, Size
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import VIEWS, ImageTable, View
from s4g_ray.data.images import load_pixels
from s4g_ray.encoder.actors import (
    EncoderPool,
    Encoding,
    Pixels,
    ReleasedError,
    encode_part_on,
    find_least_loaded,
)
from s4g_ray.errors import BadImageError, GpuMemoryError, RunError, reason_of
from s4g_ray.progress import Update, ignore
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, Stamp, is_published, open_published, publish
from s4g_ray.storage.part_commits import WORK, check_reached, read_commit, write_commit

if TYPE_CHECKING:  # the tasks of this job need neither torch nor timm, which take seconds to import
    from s4g_ray.encoder.precision import Numerics

Row = dict[str, Any]
PART_BYTES = 64_000_000  # of pixels: a loading task holds a few times as much
LOADER_CPUS = 0.25  # logical CPUs of a loading task
SHOWN = 10  # images that could not be decoded, listed in the summary
LOADERS = 2  # loading tasks for each actor: it encodes the part of one while another reads


@dataclass(frozen=True)
class EmbeddingReport:
    """Counts and speed of an embedding job.

    warm_images_per_s is the rate of the actors together; 0 when all parts are those of an earlier
    job.
    """

    images: int  # in the table
    seconds: float
    warm_images_per_s: float
    bad_images: tuple[str, ...]  # why each image that was skipped could not be decoded
    reused_parts: int = 0  # committed by an interrupted job

    def lines(self, name: str) -> list[str]:
        """Return a summary for the user, with the first skipped images; name: of the images."""
        num_bad = len(self.bad_images)
        left_out = f", left out {num_bad}" if num_bad else ""
        lines = [f"embedded {self.images} {name}{left_out} in {self.seconds:.0f} s"]
        lines.extend(f"  {reason}" for reason in self.bad_images[:SHOWN])
        if num_bad > SHOWN:
            lines.append(f"  and {num_bad - SHOWN} more")
        return lines


@dataclass(frozen=True)
class WrittenPart:
    """The file of a part, and why each skipped image of it could not be decoded."""

    part: Part
    bad: tuple[str, ...]

    @classmethod
    def from_row(cls, value: Row) -> Self:
        """Restore a part from the dictionary that dataclasses.asdict made of it."""
        return cls(Part(**value["part"]), tuple(value["bad"]))


@dataclass(frozen=True)
class EmbeddingJob:
    """The settings that all loading tasks share."""

    actors: tuple[Any, ...]  # of the pool; none until the job starts
    target: str
    encoding: Any  # reference to the Encoding; only actors read it, as unpickling it imports torch
    data: DataConfig
    seed: int
    key: str
    timeout_s: float  # for an actor to restart


def embed(
    pool: EncoderPool,
    config: RunConfig,
    dataset: GeoDataset,
    checkpoint: str,
    target: str,
    *,
    splits: Sequence[str],
    numerics: Numerics,
    stamp: Stamp,
    views: Sequence[View] = VIEWS,
    on_progress: Update = ignore,
) -> EmbeddingReport:
    """Embed the views of some splits into a published table at `target`.

    The test split includes the references of split `gallery`. `pool` must be made from a
    configuration with the same model. Keeps the parts that an interrupted job committed from the
    same inputs; replaces a published table.

    Raises BadImageError for a corrupt image when `data.on_bad_image` is `fail`, and when no image
    of a view can be decoded; RunError for non-finite embeddings, for actors that do not start, and
    when the job dies; GpuMemoryError for a batch that the GPU has no memory for. Errors about an
    image name it. A job whose actors make room for workers waits for new ones.
    """
    if is_published(target):
        files.remove(target)
    tables = _read_tables(dataset, splits, views, config.data.test_split)
    parts = _plan_parts(tables, config.data, config.embedding.part_rows)
    started = time.perf_counter()
    encoding = Encoding(
        checkpoint,
        open_published(checkpoint, "checkpoint").info["weights_sha256"],
        numerics,
        target,
        config.embedding.batch_size,
        config.embedding.dtype,
    )
    job = EmbeddingJob(
        (),
        target,
        ray.put(encoding),
        config.data,
        config.seed,
        _job_key(config, numerics, stamp),
        config.ray.start_timeout_s,
    )
    results = _run_on_pool(pool, job, parts, on_progress)
    written = [WrittenPart.from_row(json.loads(row["outcome"])) for row in results]
    _check_views(tables, written)
    bad = tuple(reason for outcome in written for reason in outcome.bad)
    _publish(target, [outcome.part for outcome in written], stamp, splits, bad)
    seconds = time.perf_counter() - started
    num_reused = sum(1 for row in results if row["reused"])
    total = sum(len(table) for table in tables.values())
    return EmbeddingReport(total - len(bad), seconds, warm_rate(results), bad, num_reused)


def _read_tables(
    dataset: GeoDataset, splits: Sequence[str], views: Sequence[View], test_split: str
) -> dict[View, ImageTable]:
    reference_splits = list(splits)
    if test_split in splits:
        reference_splits.append("gallery")
    tables = {}
    for view in views:
        tables[view] = dataset.table(view, reference_splits if view == "references" else splits)
    return tables


def _check_views(tables: dict[View, ImageTable], written: Sequence[WrittenPart]) -> None:
    """Raise BadImageError for a view without a single image that could be decoded."""
    reasons = [reason for outcome in written for reason in outcome.bad]
    first_reason = reasons[0] if reasons else "there are none"
    for view, table in tables.items():
        parts = [outcome.part for outcome in written]
        if not sum(part.rows for part in parts if part.name.startswith(f"{view}/")):
            raise BadImageError(f"none of the {len(table)} {view} could be decoded: {first_reason}")


def warm_rate(results: list[Row]) -> float:
    """Return the images per second of all actors together.

    An actor's time runs from the start of its first part to the end of its last. It includes
    reading, decoding, encoding, writing and the waits between parts, but not the start of the
    actor. Parts kept from an earlier job do not count.
    """
    rate = 0.0
    for actor in {row["actor"] for row in results} - {""}:
        rows = [row for row in results if row["actor"] == actor]
        seconds = max(row["finished"] for row in rows) - min(row["started"] for row in rows)
        rate += sum(row["images"] for row in rows) / seconds
    return rate


def _plan_parts(tables: dict[View, ImageTable], data: DataConfig, part_rows: int) -> list[Row]:
    """Return a row for each part, with the part of the image table that its task needs.

    A part has part_rows images, or fewer: PART_BYTES limits its pixels.
    """
    parts = []
    for view, table in tables.items():
        height, width = image_size(data, view)
        num_rows = min(part_rows, max(1, PART_BYTES // (3 * height * width)))
        for number, start in enumerate(range(0, len(table), num_rows)):
            own = table.take(slice(start, start + num_rows))
            parts.append({"view": view, "part": number, "images": len(own), "table": own})
    return parts


def image_size(data: DataConfig, view: View) -> Size:
    """Return the height and width of a view's images as the encoder takes them."""
    return data.visible_query_size if view == "queries" else data.reference_size


def _job_key(config: RunConfig, numerics: Numerics, stamp: Stamp) -> str:
    """Return a fingerprint of the settings that determine the content of all parts."""
    settings = {
        "release": __version__,
        "stamp": asdict(stamp),
        "numerics": asdict(numerics),
        "seed": config.seed,
        "on_bad_image": config.data.on_bad_image,
    }
    return files.fingerprint(json.dumps(settings, sort_keys=True).encode())


def part_key(job_key: str, view: str, table: ImageTable) -> str:
    """Return a fingerprint of a part's inputs: the job's, its images, and their locations."""
    ranges = [table.offsets.tolist(), table.lengths.tolist()]
    rows = json.dumps([view, len(table), list(table.uris), *ranges])
    return files.fingerprint(
        job_key.encode(),
        rows.encode(),
        table.ids.tobytes(),
        table.place_ids.tobytes(),
        table.headings.tobytes(),
    )


def _run_on_pool(
    pool: EncoderPool, job: EmbeddingJob, parts: list[Row], on_progress: Update
) -> list[Row]:
    """Run the job on the pool's actors; again, without its finished parts, when they made room."""
    while True:
        try:
            with pool.job() as actors:
                return _collect_results(replace(job, actors=actors), parts, on_progress)
        except ReleasedError:
            continue


def _collect_results(job: EmbeddingJob, parts: list[Row], on_progress: Update) -> list[Row]:
    """Run the job and return the rows of its parts, sorted by view and number.

    Raises BadImageError and RunError as embed does.
    """
    total = sum(row["images"] for row in parts)
    done = 0
    results = []
    try:
        # close the stream at once after a failure: the next job needs the room of its tasks
        with closing(_stream_results(job, parts)) as rows:
            for row in rows:
                _raise_fault(row)
                done += row["images"]
                results.append(row)
                on_progress(done, total)
    except RayError as error:
        raise RunError(
            f"the embedding job failed after {done} of {total} images: {reason_of(error)}"
        ) from error
    return sorted(results, key=lambda row: (row["view"], row["part"]))


def _stream_results(job: EmbeddingJob, parts: list[Row]) -> Generator[Row, None, None]:
    """Run the job; yield a row for each finished part, in any order."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised, not logged too
    results = ray.data.from_items(parts, override_num_blocks=len(parts)).map(
        _embed_part,  # type: ignore[arg-type]
        fn_kwargs={"job": job},
        compute=ray.data.TaskPoolStrategy(size=LOADERS * len(job.actors)),
        num_cpus=LOADER_CPUS,
    )
    yield from results.iter_rows()


def _embed_part(row: Row, *, job: EmbeddingJob) -> Row:
    """Reuse a part that an earlier job committed from the same inputs, or make and commit it.

    A Ray task. Returns a row of the job's results; `fault` and `message` hold an error that a user
    can fix.
    """
    started = time.time()
    view = row["view"]
    name = f"{view}/part-{row['part']:05d}.parquet"
    result = {
        "view": view,
        "part": row["part"],
        "images": row["images"],
        "fault": "",
        "message": "",
        "outcome": "",
        "reused": True,
        "actor": "",
        "started": started,
        "finished": started,
    }
    commit_uri = files.join(job.target, WORK, f"{name}.json")
    key = part_key(job.key, view, row["table"])
    committed = read_commit(
        commit_uri, key, WrittenPart.from_row, lambda written: [(job.target, written.part)]
    )
    if committed is not None and not committed.bad:  # the user may have fixed bad images since
        result["outcome"] = json.dumps(asdict(committed))
        return result
    try:
        pixels, bad = load_part(row["table"], view, name, job.data, seed=job.seed)
        actor = find_least_loaded(job.actors, row["part"])
        encoded = encode_part_on(actor, job.encoding, pixels, timeout_s=job.timeout_s)
    except (BadImageError, RunError) as error:
        result["fault"] = type(error).__name__
        result["message"] = str(error)
        return result
    written = WrittenPart(encoded.part, bad)
    write_commit(commit_uri, key, written)
    result["outcome"] = json.dumps(asdict(written))
    result["reused"] = False
    result["actor"] = encoded.actor
    result["started"] = max(started, encoded.ready)
    result["finished"] = encoded.finished
    return result


def load_part(
    table: ImageTable, view: View, name: str, data: DataConfig, *, seed: int
) -> tuple[Pixels, tuple[str, ...]]:
    """Read and decode the images of a part; return them, and a reason for each that is skipped.

    Raises BadImageError for the first corrupt image when `data.on_bad_image` is `fail`.
    """
    loaded = load_pixels(table, range(len(table)), view, data, seed=seed)
    bad = []
    good = []
    good_rows = []
    for row, image in enumerate(loaded):
        if isinstance(image, BadImageError):
            bad.append(image)
        else:
            good.append(image)
            good_rows.append(row)
    if bad and data.on_bad_image == "fail":
        raise bad[0]
    images = np.empty((len(good), 3, *image_size(data, view)), dtype=np.uint8)
    for i, image in enumerate(good):
        images[i] = image
    rows = np.array(good_rows, dtype=np.int64)
    pixels = Pixels(name, view, table.ids[rows], table.place_ids[rows], images)
    return pixels, tuple(str(error) for error in bad)


def _raise_fault(row: Row) -> None:
    """Raise the error that a loading task reported in its row, if any."""
    if row["fault"] == BadImageError.__name__:
        raise BadImageError(f"{row['message']}; fix the image, or set data.on_bad_image=skip")
    if row["fault"] == GpuMemoryError.__name__:
        raise GpuMemoryError(row["message"])
    if row["fault"]:
        raise RunError(row["message"])


def _publish(
    target: str, parts: list[Part], stamp: Stamp, splits: Sequence[str], bad: tuple[str, ...]
) -> None:
    """Publish the table; remove files of an earlier job and the commits.

    Raises RunError for parts that were written but cannot be found.
    """
    check_reached(target, parts)
    names = {part.name for part in parts}
    for folder in set(files.list_names(target)) - {WORK}:
        for file in files.list_names(files.join(target, folder)):
            if f"{folder}/{file}" not in names:
                files.remove(files.join(target, folder, file))
    publish(target, "embeddings", parts, stamp, {"splits": list(splits), "bad_images": list(bad)})
    files.remove(files.join(target, WORK))
