"""RequestOptions: the query parameters of a request, checked, and their OpenAPI description."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from s4g_ray.serving.refusal import Refusal

MAX_TOP = 1000
MAX_TURNS = 32


@dataclass(frozen=True)
class RequestOptions:
    """How a request's photos are located. Requests with equal options are located together."""

    top: int = 10
    # latitude and longitude, degrees; exif: those in the photo's own tags
    near: tuple[float, float] | Literal["exif"] | None = None
    within_m: float | None = None
    turns: int = 1
    refine: bool = False
    as_geojson: bool = False

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> Self:
        """Read the query parameters. Raises Refusal (422) with the parameter, limit and remedy."""
        check_names(query, ("top", "near", "within_km", "turns", "refine", "format"))
        near = _read_near(query["near"]) if "near" in query else None
        within_km = _read_number("within_km", query["within_km"]) if "within_km" in query else None
        if (near is None) != (within_km is None):
            raise _refuse("near=LAT,LON and within_km=R belong together; give both or neither")
        if within_km is not None and not 0 < within_km <= 20_040:
            raise _refuse(f"within_km={within_km:g} is not within 0..20040 km")
        kind = query.get("format", "json")
        if kind not in ("json", "geojson"):
            raise _refuse(f"format={kind!r} is neither json nor geojson")
        return cls(
            top=read_count("top", query.get("top", "10"), MAX_TOP),
            near=near,
            within_m=None if within_km is None else within_km * 1000,
            turns=read_count("turns", query.get("turns", "1"), MAX_TURNS),
            refine=_read_flag("refine", query.get("refine", "false")),
            as_geojson=kind == "geojson",
        )

    def keywords(self) -> dict[str, Any]:
        """Return the options of Gallery.locate."""
        return {
            "top": self.top,
            "near": self.near,
            "within_m": self.within_m,
            "turns": self.turns,
            "refine": self.refine,
        }


def check_names(query: Mapping[str, str], known: Sequence[str]) -> None:
    """Check the names of query parameters. Raises Refusal (422) for one that is not known."""
    for name in query:
        if name not in known:
            raise _refuse(f"unknown parameter {name[:40]!r}; there are {', '.join(known)}")


def read_bounds(text: str) -> tuple[float, float, float, float]:
    """Read W,S,E,N in degrees. Raises Refusal (422)."""
    parts = text.split(",")
    if len(parts) != 4:
        raise _refuse(f"bounds={text[:40]!r} is not W,S,E,N in degrees")
    west, south, east, north = (_read_number("bounds", part) for part in parts)
    if not -90 <= south <= north <= 90:
        raise _refuse(f"bounds={text[:80]!r}: latitudes must be -90 <= S <= N <= 90 degrees")
    return west, south, east, north


def read_count(name: str, text: str, most: int) -> int:
    """Read a whole number within 1..most. Raises Refusal (422)."""
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most):
        raise _refuse(f"{name}={text[:40]!r} is not a whole number within 1..{most}")
    return int(text)


def _refuse(message: str) -> Refusal:
    return Refusal(422, "bad_parameter", message)


def _read_number(name: str, text: str) -> float:
    try:
        value = float(text if text.isascii() and "_" not in text else "-")
    except ValueError:
        raise _refuse(f"{name}={text[:40]!r} is not a number") from None
    if not math.isfinite(value):
        raise _refuse(f"{name}={text[:40]!r} is not a finite number")
    return value


def _read_flag(name: str, text: str) -> bool:
    flags = {"1": True, "true": True, "0": False, "false": False}
    if text.lower() not in flags:
        raise _refuse(f"{name}={text[:40]!r} is neither true nor false")
    return flags[text.lower()]


def _read_near(text: str) -> tuple[float, float] | Literal["exif"]:
    if text == "exif":
        return "exif"
    parts = text.split(",")
    if len(parts) != 2:
        raise _refuse(
            f"near={text[:40]!r} is neither LAT,LON in degrees, such as 40.7,-112.0, nor exif"
        )
    lat, lon = (_read_number("near", part) for part in parts)
    if not -90 <= lat <= 90 or not -180 <= lon <= 360:
        raise _refuse(f"near={text[:40]!r} is not on the Earth; give LAT,LON in degrees")
    return lat, lon


def _parameter(name: str, kind: dict[str, Any], text: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": kind, "description": text}


LOCATE_SCHEMA: dict[str, Any] = {
    "parameters": [
        _parameter(
            "top",
            {"type": "integer", "minimum": 1, "maximum": MAX_TOP, "default": 10},
            "candidates of an answer",
        ),
        _parameter("near", {"type": "string"}, "LAT,LON, or exif: search around this point"),
        _parameter("within_km", {"type": "number"}, "with near: within so many kilometres"),
        _parameter(
            "turns",
            {"type": "integer", "minimum": 1, "maximum": MAX_TURNS, "default": 1},
            "orientations that are tried",
        ),
        _parameter(
            "refine", {"type": "boolean", "default": False}, "refine positions by local features"
        ),
        _parameter("format", {"type": "string", "enum": ["json", "geojson"]}, "of the answer"),
    ],
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["photo"],
                    "properties": {
                        "photo": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "description": "one or more photos",
                        }
                    },
                }
            }
        },
    },
}
