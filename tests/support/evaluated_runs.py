"""A run folder with an evaluation, made without a cluster: tiles of a picture of the ground."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset, write_dataset
from s4g_ray.data.sphere import METRES_A_DEGREE
from s4g_ray.data.tables.embedding_table import encode_part
from s4g_ray.pipeline.run_folder import RunFolder
from s4g_ray.storage.manifest import publish, write_part
from tests.conftest import tiny_config

GRID = 8  # tiles along a side of the ground
PIXELS = 32  # of a tile
SIZE_M = 64.0  # of a tile; tiles touch
NORTH_WEST = (46.0, 7.0)  # degrees, of the ground's corner
STEPS = 5  # of an epoch
SOUTH = "[/red] south"  # a region that rich would read as markup


def tile_color(row: int, column: int) -> tuple[int, int, int]:
    """The color of a tile: red grows to the east, green to the south."""
    return 20 + 25 * column, 20 + 25 * row, 90


def write_ground(folder: Path, *, has_semi_positives: bool = False) -> GeoDataset:
    """Write GRID x GRID places, all of split test; place p is row p // GRID from the north.

    has_semi_positives: the place after each is semi-positive for its query; the last has none.
    """
    (folder / "images").mkdir(parents=True)
    count = GRID * GRID
    rows, columns = np.divmod(np.arange(count), GRID)
    shrink = np.cos(np.radians(NORTH_WEST[0]))
    step = SIZE_M / METRES_A_DEGREE
    for place in range(count):
        color = tile_color(*divmod(place, GRID))
        Image.new("RGB", (PIXELS, PIXELS), color).save(folder / f"images/tile <{place}>.png")
    columns_of: dict[str, Any] = {
        "id": np.arange(count) + 500,
        "place_id": np.arange(count),
        "uri": [f"images/tile <{place}>.png" for place in range(count)],
        "lat": NORTH_WEST[0] - (rows + 0.5) * step,
        "lon": NORTH_WEST[1] + (columns + 0.5) * step / shrink,
        "split": ["test"] * count,
        "region": ["north" if row < GRID / 2 else SOUTH for row in rows],
        "source_id": [f"source {place}" for place in range(count)],
    }
    references = pa.table({**columns_of, "size_m": np.full(count, SIZE_M, np.float32)})
    queries = pa.table(columns_of)
    if has_semi_positives:
        nearby = pa.array([[place + 1] for place in range(count - 1)] + [[]], pa.list_(pa.int64()))
        queries = queries.append_column("semi_positives", nearby)
    return write_dataset(str(folder), references, queries, name="<ground> & co")


def write_embeddings(
    folder: str, ids: NDArray[Any], queries: NDArray[Any], references: NDArray[Any]
) -> None:
    """Publish an embedding table of both views; ids[N] are those of both, places ids - 500."""
    parts = []
    for view, vectors in (("queries", queries), ("references", references)):
        contents = encode_part(ids, ids - 500, vectors.astype(np.float32), "float32")
        parts.append(write_part(folder, f"{view}/part-00000.parquet", contents, len(ids)))
    publish(folder, "embeddings", parts)


def write_run(
    folder: Path,
    dataset: GeoDataset,
    *,
    queries: NDArray[Any],
    references: NDArray[Any],
    recall: float = 0.5,
    epochs: int = 2,
    **sections: Any,
) -> RunConfig:
    """Write a finished run whose last evaluation has the given embeddings; recall@1 grows to it."""
    seed = sections.pop("seed", 3)
    config = tiny_config(folder, dataset.uri, train={"epochs": epochs}, **sections)
    config = config.model_copy(update={"seed": seed})
    run = RunFolder.open(config, dataset, resume=False)
    run.start()
    for epoch in range(epochs + 1):
        if epoch:
            values = {"loss": 2.0 / epoch, "epoch": epoch, "step": STEPS * epoch}
            run.log("step", **values)
            run.log(
                "epoch",
                **values,
                hardness=float(epoch),
                graph=f"v={epoch - 1:04d}",
                graph_late=0,
                graph_age=None,
                pairs_per_s=10.0,
                load_wait=0.1,
                wait_share=0.0,
                workers=1,
            )
        at_one = recall * (epoch + 1) / (epochs + 1)
        metrics = {
            "recall@1": at_one,
            "recall@5": at_one,
            "recall@10": at_one + 0.25,
            "recall@1%": at_one,
            "median_error_m": 80.0,
            "queries": float(len(queries)),
            "references": float(len(references)),
            "queries_without_reference": 0.0,
        }
        regions = {"north": metrics, SOUTH: metrics}
        run.log("evaluation", epoch=epoch, protocol="strict", regions=regions, paper={}, **metrics)
    ids = dataset.table("references", ["test"]).ids
    write_embeddings(run.path(f"embeddings/v={epochs:04d}"), ids, queries, references)
    run.update(status="done")
    return config
