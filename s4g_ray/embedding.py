"""The Ray Data job that turns a collection and a checkpoint into an embedding table.

The job streams *parts* of a collection: tasks read and decode a part's images, a pool of actors encodes them
and writes the part as Parquet; the driver publishes the table when all parts are there.
"""

from __future__ import annotations

import io
import json
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch
from numpy.typing import NDArray
from ray.exceptions import RayError

from s4g_ray import storage
from s4g_ray.config import DataConfig, RunConfig
from s4g_ray.dataset import VIEWS, GeoDataset, ImageTable, View
from s4g_ray.encoder import Numerics, load_encoder
from s4g_ray.errors import BadImageError, RunError
from s4g_ray.failures import reason_of
from s4g_ray.images import load_view
from s4g_ray.progress import Update, ignore

Row = dict[str, Any]
PART_BYTES = 64_000_000  # of pixels: a loading task holds a few times as much
LOADER_CPUS = 0.25  # logical, of a task that reads and decodes a part


@dataclass(frozen=True)
class EmbeddingReport:
    """What an embedding job did: how many images it embedded, and its actors' rate once they are started."""

    images: int
    seconds: float
    warm_images_per_s: float
    bad_images: tuple[str, ...]


def embed(
    config: RunConfig,
    dataset: GeoDataset,
    checkpoint: str,
    target: str,
    *,
    splits: Sequence[str],
    numerics: Numerics,
    stamp: storage.Stamp,
    views: Sequence[View] = VIEWS,
    on_progress: Update = ignore,
) -> EmbeddingReport:
    """Embed the views of some splits into a published table at `target`; the gallery goes with the test split.

    Raises BadImageError for a corrupt image when `data.on_bad_image` is `fail` and when no image of a view can be
    decoded, RunError for non-finite embeddings (both name the image) and when the job dies.
    """
    storage.remove(target)
    gallery = ["gallery"] if config.data.test_split in splits else []
    rows: dict[View, Sequence[str]] = {"references": [*splits, *gallery], "queries": splits}
    tables = {view: dataset.table(view, rows[view]) for view in views}
    parts = _plan_parts(tables, config)
    total = sum(len(table) for table in tables.values())
    started = time.perf_counter()
    done, results = 0, []
    try:
        for row in _stream(config, parts, checkpoint, target, numerics):
            _raise_fault(row)
            done += row["images"]
            results.append(row)
            on_progress(done, total)
    except RayError as error:
        raise RunError(f"the embedding job failed after {done} of {total} images: {reason_of(error)}") from error
    bad = tuple(reason for row in results for reason in json.loads(row["bad"]))
    for view in views:
        if not sum(row["rows"] for row in results if row["view"] == view):
            raise BadImageError(
                f"none of the {len(tables[view])} {view} could be decoded: {[*bad, 'there are none'][0]}"
            )
    _publish(target, results, stamp, splits, bad)
    return EmbeddingReport(total - len(bad), time.perf_counter() - started, warm_rate(results), bad)


def warm_rate(results: list[Row]) -> float:
    """Images per second of the actors together, each from its first part's start to its last part's end.

    Reading, decoding, encoding, writing and the waits between parts count; starting an actor does not.
    """
    rate = 0.0
    for actor in {row["actor"] for row in results}:
        rows = [row for row in results if row["actor"] == actor]
        seconds = max(row["finished"] for row in rows) - min(row["started"] for row in rows)
        rate += sum(row["images"] for row in rows) / seconds
    return rate


def _plan_parts(tables: dict[View, ImageTable], config: RunConfig) -> list[Row]:
    """A row for each part: what its task needs to read its images, and nothing of the others'.

    A part has embedding.part_rows images, or as many as PART_BYTES of pixels hold.
    """
    parts = []
    for view in tables:
        size = config.data.visible_query_size if view == "queries" else config.data.reference_size
        num_rows = min(config.embedding.part_rows, max(1, PART_BYTES // (3 * size[0] * size[1])))
        for number, start in enumerate(range(0, len(tables[view]), num_rows)):
            rows = np.arange(start, min(start + num_rows, len(tables[view])))
            parts.append({"view": view, "part": number, "images": len(rows), "table": tables[view].take(rows)})
    return parts


def _stream(
    config: RunConfig,
    parts: list[Row],
    checkpoint: str,
    target: str,
    numerics: Numerics,
) -> Any:
    """Run the job; yields a row for each finished part, in any order."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails is raised and said once
    cfg = config.embedding
    loaded = ray.data.from_items(parts, override_num_blocks=len(parts)).map(
        load_part,  # type: ignore[arg-type]
        fn_kwargs={"data": config.data, "seed": config.seed},
        num_cpus=LOADER_CPUS,
    )
    encoded = loaded.map(
        PartEncoder,  # type: ignore[arg-type]
        fn_constructor_args=(config, checkpoint, target, numerics),
        compute=ray.data.ActorPoolStrategy(size=cfg.num_actors),
        num_cpus=cfg.cpus_per_actor,
        num_gpus=cfg.gpus_per_actor,
    )
    return encoded.iter_rows()


def load_part(row: Row, *, data: DataConfig, seed: int) -> Row:
    """Read and decode the images of a part: adds ids, place_ids and pixels (uint8 bytes of [n, 3, H, W])."""
    table: ImageTable = row["table"]
    images, rows, bad = [], [], []
    result = {**{key: row[key] for key in ("view", "part", "images")}, "started": time.time()}
    for number in range(len(table)):
        try:
            images.append(load_view(table, number, row["view"], data, seed=seed).numpy())
            rows.append(number)
        except BadImageError as error:
            if data.on_bad_image == "fail":
                return {**result, "fault": "image", "message": str(error), "pixels": b"", "ids": [], "places": []}
            bad.append(str(error))
    return {
        **result,
        "fault": "",
        "message": json.dumps(bad),
        "pixels": np.stack(images).tobytes() if images else b"",
        "ids": table.ids[rows].tolist(),
        "places": table.place_ids[rows].tolist(),
    }


class PartEncoder:
    """An actor that encodes the images of a part, L2-normalises them, and writes the part."""

    def __init__(self, config: RunConfig, checkpoint: str, target: str, numerics: Numerics) -> None:
        torch.set_num_threads(config.embedding.threads_per_actor)
        self.config, self.checkpoint, self.target, self.numerics = config, checkpoint, target, numerics
        self.device = torch.device("cuda" if config.embedding.gpus_per_actor else "cpu")
        self.encoder = load_encoder(config.model, checkpoint).to(self.device).eval()
        numerics.prepare(self.encoder)
        self.name, self.ready = uuid.uuid4().hex, time.time()

    def __call__(self, row: Row) -> Row:
        """Encode a loaded part and write it; returns what its manifest needs."""
        result = {key: row[key] for key in ("view", "part", "images", "fault", "message")}
        result.update(actor=self.name, started=max(row["started"], self.ready), finished=0.0)
        result.update(rows=0, num_bytes=0, sha256="", bad="[]")
        if row["fault"]:
            return result
        ids = np.asarray(row["ids"], dtype=np.int64)
        vectors = self._encode(row, len(ids))
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            batch = bad[0] // self.config.embedding.batch_size
            message = (
                f"the embedding of {row['view']} id {ids[bad[0]]} is not finite ({len(bad)} such in part {row['part']},"
                f" from its batch {batch} on), by {self.checkpoint}"
            )
            return {**result, "fault": "embedding", "message": message}
        data = _encode_part(ids, np.asarray(row["places"], np.int64), vectors, self.config.embedding.dtype)
        part = storage.write_part(self.target, f"{row['view']}/part-{row['part']:05d}.parquet", data, len(ids))
        result.update(rows=part.rows, num_bytes=part.num_bytes, sha256=part.sha256, bad=row["message"])
        return {**result, "finished": time.time()}

    def _encode(self, row: Row, count: int) -> NDArray[np.float32]:
        if not count:
            return np.zeros((0, self.encoder.dim), dtype=np.float32)
        data = self.config.data
        sizes = {"references": data.reference_size, "queries": data.visible_query_size}
        images = torch.frombuffer(bytearray(row["pixels"]), dtype=torch.uint8).view(count, 3, *sizes[row["view"]])
        with torch.inference_mode():
            vectors = [
                self.numerics.embed(self.encoder, batch.to(self.device))
                for batch in torch.split(images, self.config.embedding.batch_size)
            ]
        return torch.nn.functional.normalize(torch.cat(vectors).float(), dim=1).cpu().numpy()


def _encode_part(ids: NDArray[np.int64], places: NDArray[np.int64], vectors: NDArray[Any], dtype: str) -> bytes:
    values = pa.array(vectors.astype(dtype).ravel())
    table = pa.table(
        {
            "id": pa.array(ids, pa.int64()),
            "place_id": pa.array(places, pa.int64()),
            "embedding": pa.FixedSizeListArray.from_arrays(values, vectors.shape[1]),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="none", use_dictionary=False)
    return buffer.getvalue()


def _raise_fault(row: Row) -> None:
    if row["fault"] == "image":
        raise BadImageError(f"{row['message']}; mend the image, or set data.on_bad_image=skip")
    if row["fault"]:
        raise RunError(row["message"])


def _publish(
    target: str, results: list[Row], stamp: storage.Stamp, splits: Sequence[str], bad: tuple[str, ...]
) -> None:
    ordered = sorted(results, key=lambda row: (row["view"], row["part"]))
    parts = [
        storage.Part(f"{r['view']}/part-{r['part']:05d}.parquet", r["rows"], r["num_bytes"], r["sha256"])
        for r in ordered
    ]
    storage.publish(target, "embeddings", parts, stamp, {"splits": list(splits), "bad_images": list(bad)})
