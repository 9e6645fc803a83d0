"""Write a data set of several kinds of images to pack, and read packed ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from s4g_ray.data.dataset import GeoDataset, write_dataset
from s4g_ray.datasets.inspection.dataset_checks import inspect_dataset
from s4g_ray.datasets.packing.layout import PackOptions
from s4g_ray.storage import files
from tests.conftest import SIZE, tile

SMALL = PackOptions(shard_mb=0.02)  # several shards of each view and split
WORDS = {"references": "tiles", "queries": "photos"}
NUM_PLACES = 30
NUM_IMAGES = 59  # two rows of one split share an image


def write_picture(path: Path, seed: int, kind: str, size: tuple[int, int], **how: Any) -> None:
    Image.fromarray(tile(np.random.default_rng(seed))).resize(size[::-1]).save(path, kind, **how)


def write_mixed(folder: Path) -> GeoDataset:
    """Write images of two kinds and several sizes, and their data set.

    Images are wrongly named, turned by EXIF, or shared by rows; source_ids point out of the folder.
    """
    (folder / "pictures").mkdir(parents=True)
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter
    for i in range(NUM_PLACES):
        write_picture(folder / f"pictures/r{i}.png", i, "PNG" if i % 3 else "JPEG", (SIZE, SIZE))
        how = {"exif": turned} if i % 4 == 0 else {}
        write_picture(folder / f"pictures/q{i}.jpg", 100 + i, "JPEG", (20, 48), quality=90, **how)
    rng = np.random.default_rng(0)
    places = range(NUM_PLACES)
    lat: list[float | None] = rng.uniform(40, 41, NUM_PLACES).tolist()
    lon: list[float | None] = rng.uniform(7, 8, NUM_PLACES).tolist()
    for i in (3, 5):
        lat[i] = None
        lon[i] = None
    columns: dict[str, Any] = {
        "id": [7 * i for i in places],
        "place_id": places,
        "lat": lat,
        "lon": lon,
        "split": ["train"] * 20 + ["test"] * 8 + ["val"] * 2,
        "region": [None, "here"] * 15,
        "source_id": ["../../etc/passwd", "/etc/passwd"] * 15,
    }
    uris = [f"../pictures/r{i}.png" for i in places]
    uris[11] = uris[10]  # of the same split
    uris[25] = uris[10]  # of another
    queries = {
        **columns,
        "uri": [f"{folder}/pictures/q{i}.jpg" for i in places],
        "heading_deg": [None, 90.0] * 15,
        "semi_positives": [[1, 2], None] * 15,
    }
    references = {**columns, "uri": uris}
    return write_dataset(
        f"{folder}/data", pa.table(references), pa.table(queries), name="mixed", views=WORDS
    )


def rows(dataset: GeoDataset, view: str) -> dict[int, dict[str, Any]]:
    return {row["id"]: row for row in getattr(dataset, view).to_table().to_pylist()}


def content(dataset: GeoDataset, row: dict[str, Any]) -> bytes:
    return files.read_bytes(files.join(dataset.uri, row["uri"]), row["offset"], row["length"])


def files_of(folder: str | Path) -> dict[str, bytes]:
    """Read every file below a folder."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def shards_of(dataset: GeoDataset) -> list[str]:
    return sorted(str(path) for path in Path(dataset.uri, "shards").glob("*.tar"))


def images_of(dataset: GeoDataset) -> list[dict[str, int]]:
    """Return what an inspection finds of files and of images."""
    findings = inspect_dataset(dataset.uri, decode=True).findings
    return [finding.values for finding in findings if finding.topic == "images"][:2]
