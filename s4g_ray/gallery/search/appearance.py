"""Tell whether a photo looks like those of the calibration: another camera's do not.

Local features find the position of photos of one sensor and fail on another's, also where both
show the same ground. The brightness, contrast, colours and sharpness of a photo tell which it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from PIL import Image

from s4g_ray.arrays import Floats64
from s4g_ray.data.images import Pixels

SIDE = 64  # pixels to which a photo is averaged before it is described
NUM_VALUES = 13
RIDGE = 0.05  # added to the correlations of the values
REFUSED_SHARE = 0.05  # of the calibration's own photos


@dataclass(frozen=True)
class Appearance:
    """The usual look of photos: center[F], scale[F], precision[F * F] of standardised values.

    limit: of the squared Mahalanobis distance of a usual photo.
    """

    center: tuple[float, ...]
    scale: tuple[float, ...]
    precision: tuple[float, ...]
    limit: float

    def is_usual(self, look: Floats64) -> bool:
        """Return whether a photo's look[F], by describe_look, is like those that were fitted."""
        return bool(self.distances(look[None])[0] <= self.limit)

    def distances(self, looks: Floats64) -> Floats64:
        """Compute squared Mahalanobis distances of looks[M, F] -> [M]."""
        standard = (looks - np.array(self.center)) / np.array(self.scale)
        matrix = np.array(self.precision).reshape(len(self.center), -1)
        return np.asarray(((standard @ matrix) * standard).sum(axis=1), np.float64)

    @classmethod
    def fit(cls, looks: Floats64) -> Self:
        """Fit the look of usual photos, looks[M, F], two or more.

        The limit refuses REFUSED_SHARE of them, each measured by a fit without it: of 55 infrared
        photos, and of thermal ones 0 of 650. The farthest do not set the limit: a few photos at the
        edge of a scene look like nothing else, and would let everything pass.
        """
        apart = [
            float(cls._fit_center(np.delete(looks, row, axis=0)).distances(looks[row][None])[0])
            for row in range(len(looks))
        ]
        found = cls._fit_center(looks)
        limit = float(np.quantile(apart, 1 - REFUSED_SHARE))
        return cls(found.center, found.scale, found.precision, limit)

    @classmethod
    def _fit_center(cls, looks: Floats64) -> Self:
        center = looks.mean(axis=0)
        scale = np.maximum(looks.std(axis=0), 1e-3)
        standard = (looks - center) / scale
        matrix = standard.T @ standard / len(looks) + RIDGE * np.eye(looks.shape[1])
        precision = np.linalg.inv(matrix).ravel()
        return cls(tuple(center.tolist()), tuple(scale.tolist()), tuple(precision.tolist()), 0.0)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Return the appearance of a JSON object. Raises KeyError, TypeError and ValueError."""
        center, scale, precision = (
            tuple(float(x) for x in value[name]) for name in ("center", "scale", "precision")
        )
        if not len(center) == len(scale) == NUM_VALUES or len(precision) != NUM_VALUES**2:
            raise ValueError(f"appearance has {len(center)} values, not {NUM_VALUES}")
        return cls(center, scale, precision, float(value["limit"]))


def describe_look(pixels: Pixels) -> Floats64:
    """Describe the look of pixels[H, W, 3] -> [F]: brightness, contrast, colours, sharpness.

    Independent of the orientation and, nearly, of the size of the picture.
    """
    small = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX)
    image = np.asarray(small, np.float64)
    pairs = [image[..., one] - image[..., other] for one, other in ((0, 1), (1, 2), (0, 2))]
    gray = image.mean(axis=2)
    down, across = np.gradient(gray)
    return np.array(
        [
            *(image.mean(axis=(0, 1)) / SIDE),
            *np.log1p(image.std(axis=(0, 1))),
            *(np.log1p(pair.std()) for pair in pairs),
            *(np.log1p(np.abs(pair).mean()) for pair in pairs),
            np.log((np.hypot(down, across).mean() + 1) / (gray.std() + 1)),
        ]
    )
