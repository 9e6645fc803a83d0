"""Read the position and the heading that a camera wrote into a photo's EXIF and XMP tags."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import ExifTags, Image

_GPS = ExifTags.GPS
# azimuth of a panorama's centre, from true north (Photo Sphere XMP metadata)
_POSE = re.compile(rb"GPano:PoseHeadingDegrees\s*(?:=\s*[\"']|>)\s*([-+0-9.eE]+)")
# what Pillow and its readers of rationals raise for tags that are damaged or of another type
_DAMAGED = (TypeError, ValueError, ZeroDivisionError, IndexError, KeyError, OSError, SyntaxError)


@dataclass(frozen=True)
class ExifPosition:
    """What a photo says of itself: WGS84 degrees, and the azimuth of the view where it is there.

    is_magnetic: the heading is measured from magnetic north, degrees off true north.
    """

    lat: float
    lon: float
    heading_deg: float | None = None
    is_magnetic: bool = False


def read_exif(image: Image.Image) -> ExifPosition | None:
    """Return the position in an opened image's EXIF tags; None without one, or for a damaged one.

    Tags: GPSLatitude, GPSLongitude with their references; the heading as read_heading does.
    """
    try:
        tags = image.getexif().get_ifd(ExifTags.IFD.GPSInfo)
        lat = _degrees(tags[_GPS.GPSLatitude], tags.get(_GPS.GPSLatitudeRef, "N"), "S")
        lon = _degrees(tags[_GPS.GPSLongitude], tags.get(_GPS.GPSLongitudeRef, "E"), "W")
    except _DAMAGED:
        return None
    # 0, 0 is what cameras write that have no fix
    if not (abs(lat) <= 90 and abs(lon) <= 180) or (lat == 0 and lon == 0):
        return None
    heading, is_magnetic = read_heading(image)
    return ExifPosition(lat, lon, heading, is_magnetic)


def read_heading(image: Image.Image) -> tuple[float | None, bool]:
    """Return the azimuth of an opened image's view, degrees, and whether from magnetic north.

    A panorama's own (XMP, GPano:PoseHeadingDegrees: that of its centre) before the camera's
    (GPSImgDirection, EXIF 2.32, table 15). None without one, or for a damaged one.
    """
    pose = _read_pose(image)
    if pose is not None:
        return pose, False
    try:
        return _read_direction(image.getexif().get_ifd(ExifTags.IFD.GPSInfo))
    except _DAMAGED:
        return None, False


def _read_pose(image: Image.Image) -> float | None:
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    found = _POSE.search(xmp.encode() if isinstance(xmp, str) else bytes(xmp))
    if found is None:
        return None
    try:
        heading = float(found[1])
    except ValueError:
        return None
    return heading % 360 if -360 <= heading <= 360 else None


def _degrees(parts: Any, reference: Any, negative: str) -> float:
    """Convert degrees, minutes, seconds. Raises one of _DAMAGED."""
    degrees, minutes, seconds = (*(float(part) for part in parts), 0.0, 0.0)[:3]
    value = degrees + minutes / 60 + seconds / 3600
    if not math.isfinite(value):
        raise ValueError(f"{parts} is no angle")
    return -value if _text(reference).upper().startswith(negative) else value


def _read_direction(tags: Mapping[int, Any]) -> tuple[float | None, bool]:
    try:
        heading = float(tags[_GPS.GPSImgDirection])
    except _DAMAGED:
        return None, False
    if not 0 <= heading <= 360:
        return None, False
    is_magnetic = _text(tags.get(_GPS.GPSImgDirectionRef, "T")).upper().startswith("M")
    return heading % 360, is_magnetic


def _text(value: Any) -> str:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)
