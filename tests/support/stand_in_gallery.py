"""A gallery without an encoder: each photo's answer is the tile whose id is its mean grey."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from s4g_ray.arrays import Floats64, Ints
from s4g_ray.config.data_schema import DataConfig
from s4g_ray.errors import InputError
from s4g_ray.gallery.answer import Answer, Candidate

NUM_TILES = 256
HOLD = "hold"  # a file of the folder: while it is there, batches wait
BEGUN = "begun-"  # and the process's number: files of the processes in which a batch waited


@dataclass
class StandInTiles:
    ids: Ints
    lat: Floats64
    lon: Floats64
    size_m: Floats64


@dataclass
class StandInGallery:
    """seconds: what a batch takes."""

    uri: str
    seconds: float = 0.0
    version: int = 1
    has_calibration: bool = False
    num_tiles: int = NUM_TILES
    batches: list[int] = field(default_factory=list)  # photos of each
    is_closed: bool = False

    def __post_init__(self) -> None:
        data = DataConfig(uri="-", query_size=(32, 32), reference_size=(32, 32))
        self.config = SimpleNamespace(data=data)
        ids = np.arange(NUM_TILES)
        lat = np.asarray(40 + ids // 16 * 0.01, np.float64)
        lon = np.asarray(-112 + ids % 16 * 0.01, np.float64)
        self.tiles = StandInTiles(ids, lat, lon, np.full(NUM_TILES, 60.0))

    @property
    def info(self) -> dict[str, Any]:
        return {
            "name": "lake",
            "size_m": [60.0],
            "has_calibration": False,
            "model": {"architecture": "none"},
            "attribution": None,
        }

    def reload(self) -> bool:
        stored = int((Path(self.uri) / "version").read_text())
        is_newer = stored != self.version
        self.version = stored
        return is_newer

    def close(self) -> None:
        self.is_closed = True

    def read_tile_bytes(self, tile_id: int) -> tuple[bytes, str]:
        if not 0 <= tile_id < NUM_TILES:
            raise KeyError(tile_id)
        return b"\xff\xd8 tile " + str(tile_id).encode(), "image/jpeg"

    def locate(self, images: Sequence[Any], **options: Any) -> list[Answer]:
        if options["near"] == (0.0, 0.0):
            raise InputError("no tile of the gallery has its centre in the area to search")
        self.batches.append(len(images))
        time.sleep(self.seconds)
        hold = Path(self.uri, HOLD)
        while hold.exists():
            Path(self.uri, f"{BEGUN}{os.getpid()}").touch()
            time.sleep(0.01)
        return [self._answer(image, options["top"]) for image in images]

    def _answer(self, photo: Any, top: int) -> Answer:
        if photo.error is not None:
            return Answer.from_error(photo.name, photo.error)
        best = round(float(photo.pixels.mean()))
        ids = [(best + step) % NUM_TILES for step in range(top)]
        candidates = tuple(
            Candidate(
                i, float(self.tiles.lat[i]), float(self.tiles.lon[i]), 60.0, 0.9, None, None, (i,)
            )
            for i in ids
        )
        if best == 0:  # black
            return Answer(photo.name, candidates, reason="nothing is like it")
        return Answer(
            photo.name,
            candidates,
            lat=candidates[0].lat,
            lon=candidates[0].lon,
            is_located=True,
        )


def write_stand_in(folder: Path, version: int = 1) -> str:
    """Write what open_stand_in reads."""
    made = folder / "version.new"
    made.write_text(str(version))
    made.replace(folder / "version")  # it may be read now
    return str(folder)


def open_stand_in(uri: str, seconds: float = 0.0) -> StandInGallery:
    """Open it, as a replica does. seconds: of a batch."""
    return StandInGallery(uri, seconds=seconds)
