"""Build a real gallery over a part of the Landsat scene, with photos of known position.

The encoder is untrained. A photo is a true-colour cut of the ground of a tile, with noise: the
tile is the one that is most like it by any encoder, as rank_by_hand finds with torch and numpy.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from s4g_ray.arrays import Ints
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.pixels.stretch import Stretch
from s4g_ray.datasets import folder as photo_folder
from s4g_ray.datasets.imagery.convert import convert
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.gallery.fitting.calibrate import CalibrationOptions, calibrate
from s4g_ray.gallery.gallery import Gallery, open_gallery
from tests.conftest import tiny_config
from tests.support import galleries, landsat

BOUNDS = (-112.72, 40.70, -112.60, 40.78)
SIZE_M = 1920.0
NUM_PHOTOS = 60  # to calibrate on
NOISE = 6.0  # standard deviation of a photo's pixels
OFF_M = 60.0  # of a photo's centre from its tile's, on each axis, at most


@dataclass(frozen=True)
class LakeGallery:
    """A calibrated gallery, and the data set that its tiles come from."""

    gallery: Gallery
    region: GeoDataset

    def take_photo(self, row: int, path: Path, *, pixels: int = 256) -> Path:
        """Write a photo of the ground of a tile, by row."""
        tiles = self.gallery.tiles
        path.write_bytes(make_photo(tiles.lat[row], tiles.lon[row], row, pixels)[0])
        return path

    def rank_by_hand(self, photo: Path, k: int) -> Ints:
        """Return the ids of the k tiles most like a photo: each decoded and embedded by itself."""
        config = tiny_config("-", "-")
        encoder = Encoder.build(config.model, seed=0).eval()
        table = self.region.references.to_table().sort_by("id")
        height, width = config.data.reference_size
        vectors = []
        rows = table.select(["uri", "offset", "length"]).to_pylist()
        tiles = [
            (Path(self.region.uri) / row["uri"]).read_bytes()[row["offset"] :][: row["length"]]
            for row in rows
        ]
        for data in [photo.read_bytes(), *tiles]:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            small = image.resize((width, height), Image.Resampling.BILINEAR)
            pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]
            with torch.inference_mode():
                vectors.append(encoder.embed(pixels, "references")[0].double().numpy())
        unit = np.stack([vector / np.linalg.norm(vector) for vector in vectors])
        best = np.argsort(-(unit[1:] @ unit[0]), kind="stable")[:k]
        return np.asarray(table["id"].to_numpy()[best], np.int64)


def make_photo(lat: float, lon: float, seed: int, pixels: int) -> tuple[bytes, float, float]:
    """Return a JPEG of the true-colour scene about a point, off by a little, and its position."""
    rng = np.random.default_rng((7, seed))
    east, north = rng.uniform(-OFF_M, OFF_M, 2)
    lat, lon = landsat.move(lat, lon, east, north)
    scene = landsat.open_scene("landsat.tif", landsat.TRUE_COLOR)
    picture = scene.cut(lat, lon, metres=SIZE_M / pixels, pixels=pixels)
    noisy = np.clip(picture + rng.normal(0, NOISE, picture.shape), 0, 255).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(noisy).save(data, "JPEG", quality=92)
    return data.getvalue(), float(lat), float(lon)


def build_lake_gallery(folder: Path) -> LakeGallery:
    """Cut the region, build its gallery, and calibrate it on photos of a part of the tiles."""
    region = convert(
        landsat.data_path("landsat.tif"),
        str(folder / "region"),
        size_m=SIZE_M,
        overlap=0.5,
        pixels=64,
        bands=landsat.TRUE_COLOR,
        bounds=BOUNDS,
        stretch=Stretch(percentiles=(2.0, 98.0)),
        num_tasks=0,
    )
    galleries.build(folder, region.uri, folder / "gallery")
    tiles = region.references.to_table().sort_by("id").to_pylist()
    (folder / "photos").mkdir()
    lines = ["path,lat,lon"]
    for number in range(NUM_PHOTOS):
        tile = tiles[number * len(tiles) // NUM_PHOTOS]
        data, lat, lon = make_photo(tile["lat"], tile["lon"], 1000 + number, 64)
        (folder / "photos" / f"{number}.jpg").write_bytes(data)
        lines.append(f"{number}.jpg,{lat:.7f},{lon:.7f}")
    (folder / "photos/queries.csv").write_text("\n".join(lines))
    photos = photo_folder.convert(
        str(folder / "photos"),
        str(folder / "paired"),
        references=region.uri,
        test_fraction=0.9,
    )
    options = CalibrationOptions(splits=("train", "test"), refine=False)
    calibrate(str(folder / "gallery"), photos.uri, options=options)
    return LakeGallery(open_gallery(str(folder / "gallery")), region)
