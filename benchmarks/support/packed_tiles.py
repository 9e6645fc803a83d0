"""Write a data set of JPEG tiles in one packed file, quickly and of any number."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from s4g_ray.data.dataset import GeoDataset, write_dataset

DISTINCT = 256  # images; the others repeat them at other byte ranges


def write_tiles(folder: Path, count: int, size: int, *, quality: int = 90) -> GeoDataset:
    """Write `count` places with tiles of size x size pixels; a query is its reference's image.

    Places lie in clusters, and their ids do not follow the order of the images.
    """
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    contents = [_draw_tile(rng, size, quality) for _ in range(min(count, DISTINCT))]
    chosen = np.arange(count) % len(contents)
    lengths = np.array([len(data) for data in contents])[chosen]
    offsets = np.cumsum(lengths) - lengths
    with (folder / "tiles.pack").open("wb") as file:
        for number in chosen:
            file.write(contents[number])
    centres = rng.uniform((-60, -180), (60, 180), (max(1, count // 1000), 2))
    positions = centres[rng.integers(len(centres), size=count)] + rng.normal(0, 0.2, (count, 2))
    table = pa.table(
        {
            "id": np.arange(count),
            "place_id": rng.permutation(count),
            "uri": pa.array(["tiles.pack"]).take(pa.array(np.zeros(count, dtype=np.int64))),
            "offset": offsets,
            "length": lengths,
            "lat": positions[:, 0],
            "lon": (positions[:, 1] + 180) % 360 - 180,
            "split": pa.array(["train"]).take(pa.array(np.zeros(count, dtype=np.int64))),
        }
    )
    return write_dataset(str(folder), table, table, name="tiles")


def with_absolute_uris(table: pa.Table, folder: str) -> pa.Table:
    """Return the rows of a data set with URIs that hold outside of its folder."""
    uris = pa.array([str(Path(folder, uri)) for uri in table["uri"].to_pylist()])
    return table.set_column(table.schema.get_field_index("uri"), "uri", uris)


def _draw_tile(rng: np.random.Generator, size: int, quality: int) -> bytes:
    """Draw a smooth pattern with grain: its file is about as large as that of a photo."""
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = rng.integers(-12, 13, smooth.shape, dtype=np.int16)
    buffer = io.BytesIO()
    image = Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
