"""Embed a data set by Ray Data alone: rows of a table, decoding tasks, encoder actors, Parquet.

The form that the embedding job is measured against. It does not order rows by place, commits
nothing, and leaves out no bad image.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data import ActorPoolStrategy

from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import open_dataset
from s4g_ray.data.images import ImageFile, read_pixels
from s4g_ray.encoder.checkpoint import load_encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.errors import BadImageError
from s4g_ray.storage import files

Columns = dict[str, Any]
READ = ["id", "place_id", "uri", "offset", "length"]
BLOCK_BYTES = 64_000_000  # of pixels that a decoding task gives


def decode(batch: Columns, *, folder: str) -> Columns:
    """Decode the images of some rows, all of one size."""
    columns = (batch[name].tolist() for name in ("id", "uri", "offset", "length"))
    found = [
        ImageFile(id_, files.join(folder, uri), offset, length, 0.0)
        for id_, uri, offset, length in zip(*columns, strict=True)
    ]
    pixels = []
    for image in read_pixels(found):
        assert not isinstance(image, BadImageError)
        pixels.append(np.moveaxis(image, 0, -1))
    return {"id": batch["id"], "place_id": batch["place_id"], "image": np.stack(pixels)}


class DataEncoder:
    """An encoder in an actor of Ray Data."""

    def __init__(self, config: RunConfig, checkpoint: str, numerics: Numerics) -> None:
        torch.set_num_threads(config.embedding.threads_per_actor)
        self._numerics = numerics
        self._dtype = config.embedding.dtype
        self._encoder = load_encoder(config.model, checkpoint).eval()
        numerics.prepare(self._encoder)

    def __call__(self, batch: Columns) -> pa.Table:
        """Encode a batch of images."""
        images = torch.from_numpy(batch["image"].copy()).permute(0, 3, 1, 2)
        with torch.inference_mode():
            found = self._numerics.embed(self._encoder, images, "references").float()
            vectors = torch.nn.functional.normalize(found, dim=1).numpy().astype(self._dtype)
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        return pa.table({"id": batch["id"], "place_id": batch["place_id"], "embedding": column})


def embed_by_ray_data(
    config: RunConfig, dataset_uri: str, checkpoint: str, numerics: Numerics, target: str
) -> None:
    """Embed the references of a data set into Parquet files of about embedding.part_mb."""
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    cfg = config.embedding
    height, width = config.data.reference_size
    smallest, largest = cfg.actors
    rows_at_once = max(cfg.batch_size, BLOCK_BYTES // (3 * height * width))
    # not read_parquet, which would unpickle what a column of Ray's own types may hold
    table = open_dataset(dataset_uri).references.to_table(columns=READ)
    rows = ray.data.from_arrow(table).repartition(target_num_rows_per_block=rows_at_once)
    decoded = rows.map_batches(
        decode,  # type: ignore[arg-type]
        fn_kwargs={"folder": dataset_uri},
        batch_size=rows_at_once,
        num_cpus=0.5,  # other than the actors', or Ray Data decodes within them
    )
    embedded = decoded.map_batches(
        DataEncoder,
        fn_constructor_args=(config, checkpoint, numerics),
        batch_size=cfg.batch_size,
        num_cpus=cfg.cpus_per_actor,
        compute=ActorPoolStrategy(min_size=smallest, max_size=largest),
    )
    embedded.write_parquet(target, min_rows_per_file=15_504, ray_remote_args={"num_cpus": 0.2})
