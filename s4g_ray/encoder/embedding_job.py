"""The Ray Data job that turns a collection and a checkpoint into an embedding table.

The job streams *parts* of a collection: tasks read and decode a part's images and hand them to an actor of a pool,
which encodes them and writes the part as Parquet; then a small commit is written beside it, which a job that starts
again keeps. The driver publishes the table when all parts are there.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import ray.data
from ray.exceptions import RayActorError, RayError, RayTaskError

from s4g_ray import __version__
from s4g_ray.config.schema import DataConfig, RunConfig, Size
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import VIEWS, ImageTable, View
from s4g_ray.data.images import load_pixels
from s4g_ray.encoder.actors import (
    RETRIES,
    Encoded,
    EncoderPool,
    Encoding,
    Pixels,
    ask_load,
    least_loaded,
)
from s4g_ray.errors import BadImageError, RunError, reason_of
from s4g_ray.progress import Update, ignore
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, Stamp, is_published, open_published, publish
from s4g_ray.storage.part_commits import WORK, Files, check_reached, read_commit, write_commit

if TYPE_CHECKING:  # torch and timm take seconds to import, which the tasks of this job need not
    from s4g_ray.encoder.precision import Numerics

Row = dict[str, Any]
PART_BYTES = 64_000_000  # of pixels: a loading task holds a few times as much
LOADER_CPUS = 0.25  # logical, of a task that reads and decodes a part
SHOWN = 10  # images that were left out
LOADERS = 2  # for each actor: while it encodes the part of one, the other reads the next


@dataclass(frozen=True)
class EmbeddingReport:
    """What an embedding job did: how many images the table holds, and the rate of the actors that encoded them.

    warm_images_per_s is 0 where all parts are those of an earlier job.
    """

    images: int
    seconds: float
    warm_images_per_s: float
    bad_images: tuple[str, ...]
    reused_parts: int = 0  # committed by a job that was cut off

    def lines(self, name: str) -> list[str]:
        """What is said of a job that embedded images of that name, and of the first few that were left out."""
        bad = self.bad_images
        left_out = f", left out {len(bad)}" if bad else ""
        said = [f"embedded {self.images} {name}{left_out} in {self.seconds:.0f} s"]
        more = [f"  and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
        return said + [f"  {reason}" for reason in bad[:SHOWN]] + more


@dataclass(frozen=True)
class WrittenPart:
    """What was made of a part: its file, and why images were left out."""

    part: Part
    bad: tuple[str, ...]

    @classmethod
    def from_row(cls, value: Row) -> Self:
        return cls(Part(**value["part"]), tuple(value["bad"]))


@dataclass(frozen=True)
class EmbeddingJob:
    """What every task knows."""

    actors: tuple[Any, ...]
    target: str
    encoding: Any  # reference to the Encoding, which only actors read: it comes with torch
    data: DataConfig
    seed: int
    key: str
    timeout_s: float  # of an actor that starts again


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
    """Embed the views of some splits into a published table at `target`; the gallery goes with the test split.

    `pool` is of a configuration with the same model. Parts that an interrupted job committed are kept where they were
    made from the same, and a published table is made anew. Raises BadImageError for a corrupt image when
    `data.on_bad_image` is `fail` and when no image of a view can be decoded, RunError for non-finite embeddings (both
    name the image), for actors that do not start and when the job dies.
    """
    if is_published(target):
        files.remove(target)
    gallery = ["gallery"] if config.data.test_split in splits else []
    rows: dict[View, Sequence[str]] = {"references": [*splits, *gallery], "queries": splits}
    tables = {view: dataset.table(view, rows[view]) for view in views}
    parts = _plan_parts(tables, config)
    total = sum(len(table) for table in tables.values())
    started, cfg = time.perf_counter(), config.embedding
    weights = open_published(checkpoint, "checkpoint").info["weights_sha256"]
    encoding = Encoding(checkpoint, weights, numerics, target, cfg.batch_size, cfg.dtype)
    key = _job_key(config, numerics, stamp)
    with pool.job() as actors:
        job = EmbeddingJob(
            actors,
            target,
            ray.put(encoding),
            config.data,
            config.seed,
            key,
            config.ray.start_timeout_s,
        )
        results = _run(job, parts, total, on_progress)
    outcomes = [WrittenPart.from_row(json.loads(row["outcome"])) for row in results]
    bad = tuple(reason for outcome in outcomes for reason in outcome.bad)
    for view, table in tables.items():
        if not sum(
            outcome.part.rows for outcome in outcomes if outcome.part.name.startswith(f"{view}/")
        ):
            raise BadImageError(
                f"none of the {len(table)} {view} could be decoded: {[*bad, 'there are none'][0]}"
            )
    _publish(target, [outcome.part for outcome in outcomes], stamp, splits, bad)
    seconds, reused = time.perf_counter() - started, sum(row["reused"] for row in results)
    return EmbeddingReport(total - len(bad), seconds, warm_rate(results), bad, reused)


def warm_rate(results: list[Row]) -> float:
    """Images per second of the actors together, each from its first part's start to its last part's end.

    Reading, decoding, encoding, writing and the waits between parts count; starting an actor does not, nor what was
    kept of an earlier job.
    """
    rate = 0.0
    for actor in {row["actor"] for row in results} - {""}:
        rows = [row for row in results if row["actor"] == actor]
        seconds = max(row["finished"] for row in rows) - min(row["started"] for row in rows)
        rate += sum(row["images"] for row in rows) / seconds
    return rate


def _plan_parts(tables: dict[View, ImageTable], config: RunConfig) -> list[Row]:
    """A row for each part: what its task needs to read its images, and nothing of the others'.

    A part has embedding.part_rows images, or as many as PART_BYTES of pixels hold.
    """
    parts = []
    for view, table in tables.items():
        size = image_size(config.data, view)
        num_rows = min(config.embedding.part_rows, max(1, PART_BYTES // (3 * size[0] * size[1])))
        for number, start in enumerate(range(0, len(table), num_rows)):
            rows = np.arange(start, min(start + num_rows, len(table)))
            parts.append(
                {"view": view, "part": number, "images": len(rows), "table": table.take(rows)}
            )
    return parts


def image_size(data: DataConfig, view: View) -> Size:
    """Height and width of an image as the encoder sees it."""
    return data.visible_query_size if view == "queries" else data.reference_size


def _job_key(config: RunConfig, numerics: Numerics, stamp: Stamp) -> str:
    """A fingerprint of all that determines a part, but for its rows."""
    settings = {
        "release": __version__,
        "stamp": asdict(stamp),
        "numerics": asdict(numerics),
        "seed": config.seed,
        "on_bad_image": config.data.on_bad_image,
    }
    return files.fingerprint(json.dumps(settings, sort_keys=True).encode())


def part_key(job_key: str, view: str, table: ImageTable) -> str:
    """A fingerprint of all that determines a part: its images, and where they lie, beside what is of the whole job."""
    rows = json.dumps([view, len(table), table.uris, table.offsets, table.lengths])
    arrays = table.ids, table.place_ids, table.headings
    return files.fingerprint(
        job_key.encode(), rows.encode(), *(array.tobytes() for array in arrays)
    )


def _run(job: EmbeddingJob, parts: list[Row], total: int, on_progress: Update) -> list[Row]:
    """The rows of the finished parts, by view and number. Raises BadImageError and RunError as embed does."""
    done, results = 0, []
    try:
        with closing(
            _stream(job, parts)
        ) as rows:  # at once: a job that follows a failure needs the tasks' room
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


def _stream(job: EmbeddingJob, parts: list[Row]) -> Generator[Row, None, None]:
    """Run the job; yields a row for each finished part, in any order."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails is raised and said once
    results = ray.data.from_items(parts, override_num_blocks=len(parts)).map(
        _embed_part,  # type: ignore[arg-type]
        fn_kwargs={"job": job},
        compute=ray.data.TaskPoolStrategy(size=LOADERS * len(job.actors)),
        num_cpus=LOADER_CPUS,
    )
    yield from results.iter_rows()


def _embed_part(row: Row, *, job: EmbeddingJob) -> Row:
    """Task: what an earlier job committed of a part from the same, or the part made and committed now."""
    started, target, name = time.time(), job.target, f"{row['view']}/part-{row['part']:05d}.parquet"
    result = {key: row[key] for key in ("view", "part", "images")}
    result |= {
        "fault": "",
        "message": "",
        "outcome": "",
        "reused": True,
        "actor": "",
        "started": started,
    }
    uri, key = (
        files.join(target, WORK, f"{name}.json"),
        part_key(job.key, row["view"], row["table"]),
    )

    def files_of(outcome: WrittenPart) -> Files:
        return [(target, outcome.part)]

    outcome = read_commit(uri, key, WrittenPart.from_row, files_of)
    if outcome is not None and not outcome.bad:  # an image that was left out may have been mended
        return {**result, "outcome": json.dumps(asdict(outcome)), "finished": started}
    try:
        pixels, bad = load_part(row["table"], row["view"], name, job.data, seed=job.seed)
        encoded = encode_part_on(
            least_loaded(job.actors, row["part"]), job.encoding, pixels, timeout_s=job.timeout_s
        )
    except (BadImageError, RunError) as error:
        return {**result, "fault": type(error).__name__, "message": str(error), "finished": started}
    outcome = WrittenPart(encoded.part, bad)
    write_commit(uri, key, outcome)
    result |= {"reused": False, "actor": encoded.actor, "started": max(started, encoded.ready)}
    return {**result, "outcome": json.dumps(asdict(outcome)), "finished": encoded.finished}


def load_part(
    table: ImageTable, view: View, name: str, data: DataConfig, *, seed: int
) -> tuple[Pixels, tuple[str, ...]]:
    """Read and decode the images of a part, and say why some are left out.

    Raises BadImageError for the first that is corrupt when `data.on_bad_image` is `fail`.
    """
    found = load_pixels(table, range(len(table)), view, data, seed=seed)
    rows = np.array(
        [row for row, image in enumerate(found) if not isinstance(image, BadImageError)],
        dtype=np.int64,
    )
    bad = [image for image in found if isinstance(image, BadImageError)]
    if bad and data.on_bad_image == "fail":
        raise bad[0]
    images = np.empty((len(rows), 3, *image_size(data, view)), dtype=np.uint8)
    for at, row in enumerate(rows):
        images[at] = found[row]
    return Pixels(name, table.ids[rows], table.place_ids[rows], images), tuple(map(str, bad))


def encode_part_on(actor: Any, encoding: Any, pixels: Pixels, *, timeout_s: float) -> Encoded:
    """Have an actor encode a part; one that dies is started again, and gets the part again.

    `encoding` may be a reference to an Encoding. Raises RunError as EncoderActor.encode does, and for an actor that
    died and does not answer for timeout_s, or that dies with the part again and again.
    """
    call = actor.encode.options(concurrency_group="encode").remote(encoding, pixels)
    try:
        while not ray.wait([call], timeout=timeout_s)[0]:
            if not ray.wait([ask_load(actor)], timeout=timeout_s)[0]:
                raise RunError(
                    f"an embedding actor died, and did not start again within {timeout_s:g} s; free what it asks for,"
                    " or raise ray.start_timeout_s"
                )
        return ray.get(call)  # type: ignore[no-any-return]
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, RunError) else error) from error
    except RayActorError as error:
        raise RunError(
            f"embedding actors died {RETRIES + 1} times with {pixels.name} of {len(pixels.ids)} images; lower"
            " embedding.batch_size or embedding.part_rows if memory ran out"
        ) from error


def _raise_fault(row: Row) -> None:
    if row["fault"] == BadImageError.__name__:
        raise BadImageError(f"{row['message']}; mend the image, or set data.on_bad_image=skip")
    if row["fault"]:
        raise RunError(row["message"])


def _publish(
    target: str, parts: list[Part], stamp: Stamp, splits: Sequence[str], bad: tuple[str, ...]
) -> None:
    """Publish what was written; what lies beside it from an earlier job goes. Raises RunError for lost parts."""
    check_reached(target, parts)
    names = {part.name for part in parts}
    for folder in set(files.list_names(target)) - {WORK}:
        stale = {
            f"{folder}/{name}" for name in files.list_names(files.join(target, folder))
        } - names
        for name in stale:
            files.remove(files.join(target, name))
    publish(target, "embeddings", parts, stamp, {"splits": list(splits), "bad_images": list(bad)})
    files.remove(files.join(target, WORK))
