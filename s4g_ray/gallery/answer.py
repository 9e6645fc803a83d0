"""Define Answer: the candidates of a photo, where it was taken, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from s4g_ray.gallery.search.ground_shapes import circle_geometry, point_geometry, square_geometry

if TYPE_CHECKING:
    from s4g_ray.data.photos.exif import ExifPosition
    from s4g_ray.gallery.refinement import Refined


@dataclass(frozen=True)
class Candidate:
    """A tile that may show the ground of a photo, with the overlapping cells that it stands for.

    id, lat, lon, size_m: of the best of its cells, NaN where unknown. cells: the ids of all, the
    best first. score: cosine similarity of the best. probability: that one of the cells is the
    right one; None without a calibration. turn_deg: by how far the photo was turned clockwise; None
    where it was not turned.
    """

    id: int
    lat: float
    lon: float
    size_m: float
    score: float
    probability: float | None
    turn_deg: float | None
    cells: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them: null for NaN."""
        values = asdict(self)
        values["cells"] = list(self.cells)
        return _without_nan(values)


@dataclass(frozen=True)
class Answer:
    """Where a photo was taken, or why that cannot be told.

    photo: its name. candidates: the most probable first; without a calibration the most similar
    first. lat, lon: the most probable point. radius_50_m, radius_90_m: hold the truth with that
    probability; None without a calibration. none_probability: that the photo lies outside the
    gallery; None without a calibration. heading_deg: the azimuth of the photo's upper edge, or of a
    panorama's centre column; None where neither turns nor refinement tell it. reason: why nothing
    is located, where is_located is False. note: what the user should know about an answer, such as
    a missing calibration. error: why the photo cannot be read. refined: the position by local
    features, where it was accepted. exif: what the photo itself says.
    """

    photo: str
    candidates: tuple[Candidate, ...] = ()
    lat: float | None = None
    lon: float | None = None
    radius_50_m: float | None = None
    radius_90_m: float | None = None
    heading_deg: float | None = None
    is_located: bool = False
    reason: str | None = None
    none_probability: float | None = None
    note: str | None = None
    error: str | None = None
    refined: Refined | None = None
    exif: ExifPosition | None = None

    @classmethod
    def from_error(cls, photo: str, error: str) -> Answer:
        """Return the answer of a photo that cannot be read."""
        return cls(photo, reason=f"the photo cannot be read: {error}", error=error)

    def to_json(self) -> dict[str, Any]:
        """Return an object of JSON values with the names of the fields; null for unknown ones."""
        values = {
            "photo": self.photo,
            "is_located": self.is_located,
            "reason": self.reason,
            "lat": self.lat,
            "lon": self.lon,
            "radius_50_m": self.radius_50_m,
            "radius_90_m": self.radius_90_m,
            "heading_deg": self.heading_deg,
            "none_probability": self.none_probability,
            "note": self.note,
            "error": self.error,
            "refined": None if self.refined is None else _without_nan(asdict(self.refined)),
            "exif": None if self.exif is None else _without_nan(asdict(self.exif)),
        }
        candidates = [candidate.to_json() for candidate in self.candidates]
        return {**_without_nan(values), "candidates": candidates}

    def to_geojson(self) -> dict[str, Any]:
        """Return a FeatureCollection (RFC 7946): each feature names its `role` and its `photo`.

        Roles: `candidate`, the ground square of a tile (a point where its size is unknown);
        `radius_90` and `radius_50`, circles about the answer; `answer`, `refined` and `exif`,
        points. The answer's feature is always there, with the fields of the answer as properties;
        its geometry is null where nothing is located.
        """
        features = [
            self._feature("candidate", _tile_geometry(candidate), rank=rank, **candidate.to_json())
            for rank, candidate in enumerate(self.candidates, 1)
        ]
        point = None
        if self.lat is not None and self.lon is not None:
            point = point_geometry(self.lat, self.lon)
            for role in ("radius_90", "radius_50"):
                radius_m = getattr(self, f"{role}_m")
                if radius_m is not None:
                    circle = circle_geometry(self.lat, self.lon, radius_m)
                    features.append(self._feature(role, circle, radius_m=radius_m))
        about = self.to_json()
        for name in ("candidates", "refined", "exif"):
            del about[name]
        features.append(self._feature("answer", point, **about))
        for role in ("refined", "exif"):
            place = getattr(self, role)
            if place is not None:
                found = point_geometry(place.lat, place.lon)
                features.append(self._feature(role, found, **_without_nan(asdict(place))))
        return {"type": "FeatureCollection", "features": features}

    def _feature(
        self, role: str, geometry: dict[str, Any] | None, **properties: Any
    ) -> dict[str, Any]:
        named = {"role": role, **properties, "photo": self.photo}
        return {"type": "Feature", "geometry": geometry, "properties": named}


def _tile_geometry(candidate: Candidate) -> dict[str, Any] | None:
    if not (math.isfinite(candidate.lat) and math.isfinite(candidate.lon)):
        return None
    if not math.isfinite(candidate.size_m):
        return point_geometry(candidate.lat, candidate.lon)
    return square_geometry(candidate.lat, candidate.lon, candidate.size_m)


def _without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
