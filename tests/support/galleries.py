"""Build small galleries from the synthetic data set, and answer from its images alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset, write_dataset
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.weights import encode_weights
from s4g_ray.gallery.build import build_gallery
from s4g_ray.gallery.update import UpdateReport
from s4g_ray.storage import files
from tests.conftest import tiny_config


def write_weights(folder: Path, *, seed: int = 0) -> str:
    """Write the weights of an untrained tiny encoder; return their path."""
    config = tiny_config(folder / "run", "-")
    path = folder / f"weights-{seed}.safetensors"
    path.write_bytes(encode_weights(Encoder.build(config.model, seed=seed)))
    return str(path)


def build(
    folder: Path, dataset: str, target: str | Path, *, seed: int = 0, **options: Any
) -> UpdateReport:
    """Build a gallery with the encoder of write_weights."""
    config = tiny_config(folder / "run", dataset)
    return build_gallery(
        write_weights(folder, seed=seed), dataset, str(target), config=config, **options
    )


def write_tiles(
    folder: Path, source: GeoDataset, rows: list[int], **columns: dict[int, Any]
) -> GeoDataset:
    """Write references of a data set, by row, as another one; columns: other values, by id."""
    table = source.references.to_table().sort_by("id").take(pa.array(rows))
    values = {name: table[name].to_pylist() for name in table.column_names}
    values["uri"] = [files.join(source.uri, uri) for uri in values["uri"]]
    values["split"] = ["gallery"] * len(rows)
    for name, changed in columns.items():
        old = values.get(name, [None] * len(rows))
        pairs = zip(values["id"], old, strict=True)
        values[name] = [changed.get(tile_id, value) for tile_id, value in pairs]
    return write_dataset(
        str(folder), pa.table(values), source.queries.schema.empty_table(), name=folder.name
    )


def embed_files(paths: list[str], config: RunConfig) -> Floats32:
    """Embed image files of the encoder's size with torch alone -> [n, D], each of length 1."""
    encoder = Encoder.build(config.model).eval()
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        vectors = encoder.embed(batch, "references")
    return np.asarray(torch.nn.functional.normalize(vectors, dim=1))


def rank(
    queries: Floats32, vectors: Floats32, ids: Ints, k: int
) -> tuple[NDArray[np.int64], Floats32]:
    """Return the ids and cosines of the k nearest vectors of each query."""
    scores = queries @ vectors.T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return ids[order], np.take_along_axis(scores, order, axis=1)
