"""Define ImageValues: how the values of a data set's images become bytes of red, green and blue.

Bytes stay as they are. Other values (16 bits, signed, floating point) are stretched, and files of
2, 4 or more bands need to be told which to show. An image far from the limits of a stretch is
refused: it is not of the range that the data set names. Nearer ones are clipped, as water and snow
are by percentiles; whether a stretch makes images black or white is judged over a sample of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Bools
from s4g_ray.errors import InputError

if TYPE_CHECKING:  # numba takes a second to import
    from s4g_ray.data.pixels.stretch import Stretch

Values = NDArray[Any]  # [H, W, C]
SHADES = 1 / 8  # of a type's full range: values that use less of it have other limits
CLIPPED = 0.5  # share of values beyond a stretch above which it is not that of the image
WITHIN = -4 / 255  # widths of a stretch: what is not farther than that inside is black or white
FAR = 1.0  # widths of a stretch beyond which an image alone is not of its range
WAYS = "`s4g convert stretch DATASET percentile:2,98`"


class UnfitValuesError(ValueError):
    """An image whose values are not those that the data set names."""


@dataclass(frozen=True)
class ImageValues:
    """The stretch of values that are not bytes, and the bands to show.

    stretch: as Stretch.parse reads it, with known limits; None: nothing is known, and only values
    that use the full range of an integer type are taken. bands: three numbers, or one, from 1, of
    files with other than one or three bands; None: nothing is known.
    """

    stretch: str | None = None
    bands: tuple[int, ...] | None = None

    def check(self) -> ImageValues:
        """Return these values. Raises InputError for a stretch or bands that cannot be used."""
        if self.stretch is not None:
            stretch = self._parse(self.stretch)
            if stretch.percentiles is not None and stretch.low is None:
                raise InputError(
                    f"stretch {self.stretch}: percentiles are those of a sample of the images; find"
                    f" their limits once, by `s4g convert stretch DATASET {self.stretch}`"
                )
        if self.bands is not None and (len(self.bands) not in (1, 3) or min(self.bands) < 1):
            raise InputError(
                f"bands {list(self.bands)} are not one or three numbers of bands, from 1"
            )
        return self

    def to_bytes(self, values: Values, valid: Bools | None = None) -> NDArray[np.uint8]:
        """Turn values[H, W, C] into bytes [H, W, 3].

        valid[H, W, C]: False where a file has no data, which becomes black. Raises UnfitValuesError
        for bands that are not there, and for values of another range.
        """
        chosen = self._choose_bands(values.shape[2], values.dtype)
        shown = self.choose(values)
        if shown.dtype != np.uint8:
            known = np.isfinite(shown)
            if valid is not None:
                known &= valid[:, :, chosen]
            shown = self._stretch(shown, known)
        return np.repeat(shown, 3, axis=2) if len(chosen) == 1 else shown

    def check_sample(self, values: NDArray[np.float64], dtype: np.dtype[Any]) -> None:
        """Check values[N] of many images, of a type, together.

        Raises UnfitValuesError where limits that are known make them black or white. By a type's
        full range each image is judged alone.
        """
        stretch = self._parse(self.stretch or "full")
        if stretch.low is None or stretch.high is None or not len(values):
            return
        if values.min() < values.max():
            self._check_fit(values, dtype, min(stretch.low), max(stretch.high), WITHIN)

    def choose(self, values: Values) -> Values:
        """Return the bands to show of values[H, W, C]: one or three. Raises UnfitValuesError."""
        return np.ascontiguousarray(values[:, :, self._choose_bands(values.shape[2], values.dtype)])

    def _choose_bands(self, count: int, dtype: np.dtype[Any]) -> list[int]:
        if count in (1, 3):
            return list(range(count))
        if self.bands is None:
            if count == 4 and dtype == np.uint8:
                return [0, 1, 2]  # the fourth is its opacity
            raise UnfitValuesError(
                f"the file has {count} bands: name those to show, as data.bands=[1,2,3] or"
                " `s4g convert stretch DATASET full --bands 1,2,3`"
            )
        if max(self.bands) > count:
            raise UnfitValuesError(
                f"the file has {count} bands, and bands {list(self.bands)} are asked for; change"
                " data.bands"
            )
        return [band - 1 for band in self.bands]

    @staticmethod
    def _parse(text: str) -> Stretch:
        from s4g_ray.data.pixels.stretch import Stretch

        return Stretch.parse(text)

    def _stretch(self, values: Values, known: Bools) -> NDArray[np.uint8]:
        stretch = self._parse(self.stretch or "full")
        if not known.any():
            return np.zeros(values.shape, np.uint8)
        lowest = float(values[known].min())
        highest = float(values[known].max())
        if stretch.low is None and not np.issubdtype(values.dtype, np.integer):
            raise _refuse(values.dtype, lowest, highest, "have no full range")
        try:
            low, high = stretch.range_for(values.dtype, values.shape[2])
        except InputError as error:
            raise UnfitValuesError(str(error)) from error
        if highest > lowest:
            found = values[known].astype(np.float64)
            beyond = WITHIN if stretch.low is None else FAR
            self._check_fit(found, values.dtype, float(low.min()), float(high.max()), beyond)
        if known.all():
            return stretch.apply(values)
        if np.issubdtype(values.dtype, np.floating):
            return stretch.apply(np.where(known, values, np.nan))
        shown = stretch.apply(values)
        shown[~known] = 0
        return shown

    def _check_fit(
        self,
        found: NDArray[np.float64],
        dtype: np.dtype[Any],
        low: float,
        high: float,
        beyond: float,
    ) -> None:
        """Raise UnfitValuesError for values that lie `beyond` widths of low..high outside it."""
        lowest = float(found.min())
        highest = float(found.max())
        width = high - low
        if self.stretch is None and highest - lowest < width * SHADES:
            reason = "would be nearly one shade, as their type's full range is shown"
            raise _refuse(dtype, lowest, highest, reason)
        if highest < low - width * beyond:
            raise _refuse(dtype, lowest, highest, f"are black by stretch {self.stretch}")
        if lowest > high + width * beyond:
            raise _refuse(dtype, lowest, highest, f"are white by stretch {self.stretch}")
        margin = width * max(beyond, 0.0)
        # the lowest value may stand for missing data
        for side, share in (
            ("above", np.mean(found > high + margin)),
            ("below", np.mean((found < low - margin) & (found > lowest))),
        ):
            if share > CLIPPED:
                reason = f"lie {side} those of stretch {self.stretch} ({share:.0%} of them)"
                raise _refuse(dtype, lowest, highest, reason)


def _refuse(dtype: np.dtype[Any], lowest: float, highest: float, reason: str) -> UnfitValuesError:
    full = " data.stretch=full," if np.issubdtype(dtype, np.integer) else ""
    return UnfitValuesError(
        f"its values ({dtype}, {lowest:g} to {highest:g}) {reason}; name the range to show:"
        f" data.stretch={lowest:g},{highest:g},{full} or find it: {WAYS}"
    )


AS_STORED = ImageValues()
