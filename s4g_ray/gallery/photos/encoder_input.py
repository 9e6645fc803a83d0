"""Make the encoder's input of a photo: turned, resized and cropped as evaluation sees queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from s4g_ray.config.data_schema import DataConfig, Size
from s4g_ray.data.images import Pixels, crop_field_of_view, fit_query
from s4g_ray.gallery.photos.photo import Photo, shrink
from s4g_ray.gallery.photos.turned_views import ViewKind, turn_photo

OVERSAMPLED = 2  # photos are made smaller where they stay so many times the encoder's input


def needed_pixels(data: DataConfig) -> Size:
    """Return height and width in pixels, beyond which decoding a photo brings nothing."""
    height, width = data.query_size
    return OVERSAMPLED * height, OVERSAMPLED * width


def take_as_is(data: DataConfig) -> DataConfig:
    """Return a preprocessing that does not turn panoramas: the heading of a photo is unknown.

    Of a range of fields of view it takes the widest.
    """
    fov = data.with_fov(data.fov_range[1])
    return data.model_copy(update={"query_heading": "as_is", "query_fov_deg": fov})


def fit_photo(pixels: Pixels, data: DataConfig) -> Pixels:
    """Resize and crop pixels[H, W, 3] to the encoder's input uint8 [h, w, 3].

    data: without turning to a heading, as take_as_is returns it. Raises ValueError for other
    shapes.
    """
    fitted = fit_query(as_tensor(pixels), data, float("nan"))
    visible = crop_field_of_view(fitted, data, np.random.default_rng(0))
    return visible.permute(1, 2, 0).numpy()


def as_tensor(pixels: Pixels) -> Tensor:
    """Return pixels[H, W, 3] as a tensor [3, H, W]. Raises ValueError for other shapes."""
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"an image{list(pixels.shape)} of {pixels.dtype} is not uint8 [H, W, 3]")
    # in memory that torch takes
    return torch.from_numpy(np.require(pixels, requirements=("C", "W"))).permute(2, 0, 1)


@dataclass(frozen=True)
class InputMaker:
    """Makes the views of photos, one for each angle of `turns`, in any number of threads.

    data: as fit_photo takes it. keeps_pixels: the photo's own pixels are needed afterwards, too.
    """

    data: DataConfig
    turns: Sequence[float]
    kind: ViewKind
    keeps_pixels: bool

    def prepare(self, photo: Photo) -> Photo:
        """Return a photo with its views [T, h, w, 3]; one that cannot be read as it is."""
        if photo.pixels is None or photo.views is not None:
            return photo
        pixels = shrink(photo.pixels, needed_pixels(self.data))
        views = [fit_photo(turn_photo(pixels, turn, self.kind), self.data) for turn in self.turns]
        kept = photo.pixels if self.keeps_pixels else None
        return replace(photo, pixels=kept, views=np.stack(views))
