"""Define Stretch: how the values of a raster become bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Self

import numba
import numpy as np
from numpy.typing import NDArray

from s4g_ray.errors import InputError

Pixels = NDArray[np.uint8]  # [H, W, C]
NUMBER = r"[-+]?[0-9.]+(?:e[-+]?\d+)?"


@dataclass(frozen=True)
class Stretch:
    """A linear map of each band: `low` and less become 0, `high` and more 255.

    low, high: a value for each band, or one for all of them. None: the range of the values' type
    (bytes stay as they are); floating point has none.
    percentiles: how low and high are to be found in a sample of the imagery; choose_stretch does
    that, and `apply` needs it done. Raises InputError for ranges that are empty.
    """

    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    percentiles: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise InputError("a stretch needs both a low and a high value")
        for low, high in zip(self.low or (), self.high or (), strict=True):
            if not low < high:
                raise InputError(f"the stretch {low:g}..{high:g} is empty; give LOW below HIGH")
        if self.percentiles is not None:
            low, high = self.percentiles
            if not 0 <= low < high <= 100:
                raise InputError(f"percentiles {low:g} and {high:g} must rise within 0..100")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the stretch that a text names: `full`, `LOW,HIGH` or `percentile:LOW,HIGH`.

        `LOW,HIGH;LOW,HIGH;LOW,HIGH` gives each band its own. Raises InputError.
        """
        if text == "full":
            return cls()
        kind, _, numbers = text.rpartition(":")
        pairs = [re.fullmatch(rf"({NUMBER}),({NUMBER})", part) for part in numbers.split(";")]
        try:
            found = [(float(pair[1]), float(pair[2])) for pair in pairs if pair]
        except ValueError:
            found = []
        if kind == "percentile" and len(found) == len(pairs) == 1:
            return cls(percentiles=found[0])
        if kind == "" and len(found) == len(pairs):
            return cls(tuple(low for low, _ in found), tuple(high for _, high in found))
        raise InputError(
            f"stretch {text!r} is none of: full, LOW,HIGH (as 0,3000), percentile:LOW,HIGH (as"
            " percentile:2,98)"
        )

    def describe(self) -> str:
        """Return the stretch as a text that parse reads."""
        if self.low is not None and self.high is not None:
            pairs = zip(self.low, self.high, strict=True)
            return ";".join(f"{low:.9g},{high:.9g}" for low, high in pairs)
        if self.percentiles is not None:
            return "percentile:{:g},{:g}".format(*self.percentiles)
        return "full"

    def range_for(self, dtype: np.dtype[Any], num_bands: int) -> tuple[Any, Any]:
        """Return low[C] and high[C] for values of a type. Raises InputError."""
        if self.percentiles is not None and self.low is None:
            raise InputError("the percentiles of the imagery are not known yet; use choose_stretch")
        if self.low is not None and self.high is not None:
            low = np.asarray(self.low, np.float64)
            high = np.asarray(self.high, np.float64)
            if len(low) not in (1, num_bands):
                raise InputError(
                    f"the stretch is for {len(low)} bands, the imagery has {num_bands}"
                )
            return np.broadcast_to(low, num_bands), np.broadcast_to(high, num_bands)
        if not np.issubdtype(dtype, np.integer):
            raise InputError(
                f"values of type {dtype} have no full range; give --stretch LOW,HIGH or"
                " percentile:2,98"
            )
        limits = np.iinfo(dtype)
        return np.full(num_bands, float(limits.min)), np.full(num_bands, float(limits.max))

    def is_identity(self, dtype: np.dtype[Any]) -> bool:
        """Return whether values of a type stay as they are."""
        if dtype != np.uint8 or self.percentiles is not None:
            return False
        return self.low is None or (set(self.low) == {0.0} and set(self.high or ()) == {255.0})

    def apply(self, values: NDArray[Any]) -> Pixels:
        """Turn values[H, W, C] into bytes[H, W, C], rounded; NaN becomes 0. Raises InputError."""
        if self.is_identity(values.dtype):
            return values
        low, high = self.range_for(values.dtype, values.shape[2])
        out = np.empty(values.shape, np.uint8)
        _scale(values, low.copy(), 255 / (high - low), out)
        return out


@numba.njit(cache=True, nogil=True)
def _scale(
    values: NDArray[Any], low: NDArray[np.float64], factor: NDArray[np.float64], out: Pixels
) -> None:
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            for c in range(values.shape[2]):
                value = (values[i, j, c] - low[c]) * factor[c] + 0.5
                if value >= 255:
                    out[i, j, c] = 255
                elif value >= 0:
                    out[i, j, c] = np.uint8(value)
                else:
                    out[i, j, c] = 0  # NaN too: no comparison with it holds
