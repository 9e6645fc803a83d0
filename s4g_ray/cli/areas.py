"""Read areas that options name: GeoJSON files, and bounds in degrees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from s4g_ray.errors import InputError, RunError, StoreError

if TYPE_CHECKING:
    from s4g_ray.data.area import Area

IN_DEGREES = ("CRS84", "EPSG:4326", "EPSG::4326", "CRS:84")  # ends of names


def read_area(uri: str) -> Area:
    """Read the polygons of a GeoJSON file, local or in a store. Raises InputError without any.

    Raises StoreError for a store that does not answer.
    """
    from s4g_ray.data.area import Area
    from s4g_ray.storage import files

    try:
        value = files.read_json(files.absolute(uri))
    except StoreError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{uri} is missing; give a GeoJSON file with polygons") from error
    except OSError as error:
        raise InputError(f"{uri} cannot be read: {error}") from error
    except RunError as error:
        raise InputError(f"{uri} is not GeoJSON: {error}") from error
    _check_degrees(uri, value)
    try:
        return Area.from_geojson(value)
    except InputError as error:
        raise InputError(f"{uri}: {error}") from error


def _check_degrees(uri: str, value: Any) -> None:
    """Raise InputError for an older GeoJSON that names another reference system than degrees."""
    crs = value.get("crs") if isinstance(value, dict) else None
    properties = crs.get("properties") if isinstance(crs, dict) else None
    name = properties.get("name") if isinstance(properties, dict) else None
    if isinstance(name, str) and not name.upper().endswith(IN_DEGREES):
        raise InputError(
            f"{uri}: its coordinates are in {name}, not in degrees of longitude and latitude; write"
            f" a copy with `ogr2ogr -t_srs EPSG:4326 -lco RFC7946=YES COPY.geojson {uri}`"
        )


def parse_bounds(text: str) -> tuple[float, float, float, float]:
    """Read W,S,E,N in degrees. Raises InputError."""
    try:
        west, south, east, north = (float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(
            f"--bounds {text} is not west,south,east,north in degrees, such as 24.9,60.1,25,60.2"
        ) from error
    return west, south, east, north
