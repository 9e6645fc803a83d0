"""Compare the images/s of locating photos with those of the bare encoder.

    python -m benchmarks.locate

The gallery is built by `s4g gallery build`; photos are JPEG files of the encoder's input size, and
larger ones. Bare: decoded photos in memory, Gallery.encode alone. Both alternate in one process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks.support.record import Cell, record
from s4g_ray.config.loading import load_config
from s4g_ray.data.dataset import write_dataset
from s4g_ray.gallery.build import build_gallery
from s4g_ray.gallery.gallery import Gallery, open_gallery
from s4g_ray.gallery.locate import locate_photos, needed_size
from s4g_ray.gallery.photos.decode_ahead import read_ahead
from s4g_ray.gallery.photos.photo import read_photo
from s4g_ray.gallery.search.options import LocateOptions

CONFIG = "configs/earth.yaml"  # tf_efficientnet_lite0 with its published weights
PIXELS = 64
NUM_TILES = 2_000


def write_pictures(folder: Path, count: int, side: int, seed: int) -> list[str]:
    """Write smooth random JPEG files."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    paths = []
    for i in range(count):
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        path = folder / f"{i}.jpg"
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(
            path, quality=90
        )
        paths.append(str(path))
    return paths


def build(folder: Path) -> Gallery:
    """Build a gallery of NUM_TILES pictures on a grid."""
    paths = write_pictures(folder / "tiles", NUM_TILES, PIXELS, seed=0)
    ids = np.arange(NUM_TILES)
    columns = {
        "id": ids,
        "place_id": ids,
        "uri": paths,
        "lat": 47 + ids // 50 * 0.01,
        "lon": 8 + ids % 50 * 0.01,
        "split": ["gallery"] * NUM_TILES,
    }
    table = pa.table(columns)
    dataset = write_dataset(str(folder / "dataset"), table, table.slice(0, 0), name="grid")
    overrides = [f"data.{view}_size=[{PIXELS},{PIXELS}]" for view in ("query", "reference")]
    config = load_config(CONFIG, overrides)
    weights = str(config.model.pretrained)
    build_gallery(weights, dataset.uri, str(folder / "gallery"), config=config)
    return open_gallery(str(folder / "gallery"))


def measure(
    gallery: Gallery, paths: list[str], turns: int, repeats: int
) -> tuple[float, float, float]:
    """Return views/s of the bare encoder and of locating, and the median of their ratio."""
    least = needed_size(gallery)
    pixels = [photo.pixels for path in paths if (photo := read_photo(path, least=least))]
    views = [image for image in pixels if image is not None for _ in range(turns)]

    def bare() -> None:
        for start in range(0, len(views), 64):
            gallery.encode(views[start : start + 64])

    def located() -> None:
        photos = read_ahead(paths, every_s=1, least=least, num_threads=2, num_ahead=96)
        for _ in locate_photos(gallery, photos, LocateOptions(turns=turns)):
            pass

    bare()
    pairs = [(_seconds(bare), _seconds(located)) for _ in range(repeats)]
    best = [len(views) / min(pair[i] for pair in pairs) for i in range(2)]
    return best[0], best[1], statistics.median(a / b for a, b in pairs)


def _seconds(function: Callable[[], None]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    """Measure and record the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    rows: list[list[Cell]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gallery = build(folder)
        for side, turns in ((PIXELS, 1), (PIXELS, 4), (8 * PIXELS, 1)):
            paths = write_pictures(folder / f"{side}-{turns}", asked.photos // turns, side, seed=1)
            bare, located, share = measure(gallery, paths, turns, asked.repeats)
            rows.append([side, turns, f"{bare:.0f}", f"{located:.0f}", f"{share:.0%}"])
            print(rows[-1], flush=True)
    record(
        "locate",
        title="Locating photos",
        text=(
            "images/s of locating JPEG files (read, decode, embed, search, join, answer) beside"
            " those of the bare encoder on decoded pixels; a turned view counts as an image."
        ),
        command="python -m benchmarks.locate",
        columns=["photo, pixels", "turns", "bare encoder", "locate", "share"],
        rows=rows,
        config={"encoder": "tf_efficientnet_lite0", "input": PIXELS, "tiles": NUM_TILES},
        order=95,
    )


if __name__ == "__main__":
    main()
