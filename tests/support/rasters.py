"""Write small georeferenced rasters."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import Affine


def smooth_picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return waves of three bands [3, H, W], of 20 to 60 pixels: no two places look alike."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    bands = []
    for _ in range(3):
        picture = np.zeros((height, width))
        for _ in range(6):
            angle = rng.uniform(0, 2 * np.pi)
            length = rng.uniform(20, 60)
            along = (np.cos(angle) * columns + np.sin(angle) * rows) / length
            picture += np.sin(2 * np.pi * along + rng.uniform(0, 6))
        bands.append(128 + 18 * picture)
    return np.clip(np.stack(bands), 1, 255).astype(np.uint8)


def write_raster(
    path: Path, values: NDArray[Any], crs: str | None, transform: Affine | None, **options: Any
) -> str:
    """Write values[C, H, W] as a GeoTIFF; return its path."""
    profile = {
        "driver": "GTiff",
        "count": len(values),
        "height": values.shape[1],
        "width": values.shape[2],
        "dtype": values.dtype.name,
        "crs": crs,
        "transform": transform,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # where no place is wanted
        with rasterio.open(path, "w", **{**profile, **options}) as target:
            target.write(values)
    return str(path)
