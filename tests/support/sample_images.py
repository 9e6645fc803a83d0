"""Make images, augmentations and loaders for tests of images."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from s4g_ray.config.data_schema import AugmentConfig, DataConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import ImageTable
from s4g_ray.data.pair_loader import PairLoader
from s4g_ray.data.tables.text_column import TextColumn
from tests.conftest import SIZE, tile

OFF = {
    "jpeg_probability": 0.0,
    "color_probability": 0.0,
    "blur_probability": 0.0,
    "dropout_probability": 0.0,
    "flip_probability": 0.0,
    "rotate_probability": 0.0,
}


def make_image(seed: int = 0) -> Tensor:
    return torch.from_numpy(tile(np.random.default_rng(seed)).copy()).permute(2, 0, 1)


def make_photo(seed: int, size: tuple[int, int]) -> Tensor:
    """Make uint8 [3, H, W] with the spectrum of photographs, in colours close to grey."""
    rng = np.random.default_rng(seed)
    height, width = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    noise = rng.normal(size=(1, height, width)) + 0.1 * rng.normal(size=(3, height, width))
    pixels = np.fft.irfft2(np.fft.rfft2(noise) / (frequency + 0.02) ** 2, s=size)
    pixels = 128 + 50 * (pixels - pixels.mean()) / pixels.std()
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8))


def encode_image(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    """Encode the first image as a file."""
    buffer = io.BytesIO()
    Image.fromarray(make_image().permute(1, 2, 0).numpy()).convert(mode).save(
        buffer, kind, **options
    )
    return buffer.getvalue()


def augment_config(**values: object) -> AugmentConfig:
    """Make an augmentation that does nothing except for the given values."""
    return AugmentConfig.model_validate({**OFF, **values})


def with_uris(table: ImageTable, uris: Mapping[int, Path]) -> ImageTable:
    """Return the table with other files for some rows."""
    changed = list(table.uris)
    for row, uri in uris.items():
        changed[row] = str(uri)
    return replace(table, uris=TextColumn.from_texts(changed))


def loader(
    dataset: GeoDataset,
    *,
    augment: AugmentConfig | None = None,
    num_processes: int = 0,
    on_device: bool = False,
    **data: object,
) -> PairLoader:
    """Make a loader of the train queries, and of the train and test references."""
    sizes = {"uri": dataset.uri, "query_size": (SIZE, SIZE), "reference_size": (SIZE, SIZE)}
    return PairLoader(
        dataset.table("queries", ["train"]),
        dataset.table("references", ["train", "test"]),
        DataConfig.model_validate({**sizes, **data}),
        augment or AugmentConfig(),
        seed=1,
        num_processes=num_processes,
        on_device=on_device,
    )
