"""Define LocateOptions: what is asked about photos."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from s4g_ray.amounts import count_noun
from s4g_ray.data.area import Area
from s4g_ray.errors import InputError
from s4g_ray.gallery.photos.turned_views import ViewKind
from s4g_ray.gallery.store.tiles import Tiles

MOST_CANDIDATES = 1000
MOST_TURNS = 360


@dataclass(frozen=True)
class LocateOptions:
    """How photos are located. Raises InputError for values that do not fit together.

    top: candidates of an answer. near and within_m: search tiles whose centres lie within metres of
    lat, lon; of the position in each photo's EXIF tags for `exif`. area: search tiles whose centres
    lie in it. turns: rotations or shifts at which a photo of unknown orientation is tried. refine:
    find the exact position by local features. view: what the photos are; `auto`: as those that the
    model was trained on.
    """

    top: int = 10
    near: tuple[float, float] | Literal["exif"] | None = None
    within_m: float | None = None
    area: Area | None = None
    turns: int = 1
    refine: bool = False
    view: ViewKind | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        """Check the values."""
        if not 1 <= self.top <= MOST_CANDIDATES:
            raise InputError(f"--top {self.top} is not within 1..{MOST_CANDIDATES}")
        if not 1 <= self.turns <= MOST_TURNS:
            raise InputError(f"--turns {self.turns} is not within 1..{MOST_TURNS}")
        if (self.near is None) != (self.within_m is None):
            raise InputError(
                "a position to search near needs a distance, and a distance a position"
            )
        if self.within_m is not None and not (0 < self.within_m < math.inf):
            raise InputError(f"a distance of {self.within_m:g} m is not above 0")
        if self.near is not None and self.area is not None:
            raise InputError("give a position to search near, or an area, not both")
        if isinstance(self.near, str) and self.near != "exif":
            raise InputError(f"near={self.near!r} is no pair of lat and lon, and not 'exif'")
        if isinstance(self.near, tuple):
            _check_position(*self.near)

    def fixed_area(self) -> Area | None:
        """Return the area in which all photos are searched; None where it is not the same."""
        if self.near is None or isinstance(self.near, str) or self.within_m is None:
            return self.area
        return Area.circle(*self.near, self.within_m)


def _check_position(lat: float, lon: float) -> None:
    """Raise InputError for what is not degrees; the likely reason is its end."""
    if not (math.isfinite(lat) and math.isfinite(lon)):
        raise InputError(f"--near {lat:g},{lon:g}: give latitude and longitude as finite degrees")
    if abs(lat) <= 90:
        return
    is_swapped = abs(lon) <= 90 and abs(lat) <= 180
    hint = ": latitude and longitude look swapped" if is_swapped else ""
    raise InputError(f"--near {lat:g},{lon:g}: latitude {lat:g} is not within -90..90{hint}")


def check_area(area: Area, tiles: Tiles) -> None:
    """Raise InputError where no tile lies in an area; the likely reason is its end."""
    if area.contains(tiles.lat, tiles.lon).any():
        return
    west, south, east, north = tiles.bounds()
    hint = ""
    is_latitude = np.abs(tiles.lon) <= 90
    num_swapped = int(area.contains(tiles.lon[is_latitude], tiles.lat[is_latitude]).sum())
    if num_swapped:
        there = count_noun(num_swapped, "tile")
        hint = f"; read the other way, the area holds {there}: latitude and longitude look swapped"
    raise InputError(
        "no tile of the gallery has its centre in the area to search; the gallery covers latitudes"
        f" {south:.5f} to {north:.5f}, longitudes {west:.5f} to {east:.5f}{hint}"
    )
