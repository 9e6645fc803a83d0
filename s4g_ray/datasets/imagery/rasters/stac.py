"""Read the assets of a STAC item collection: a JSON file of items, as a search returns it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from s4g_ray.datasets.imagery.rasters.raster import Raster, open_raster
from s4g_ray.errors import InputError, RunError
from s4g_ray.storage import files

COLORS = ("red", "green", "blue")  # keys or common names of assets of one band
IMAGE_TYPES = ("image/tiff", "image/jp2", "image/vnd.stac.geotiff", "application/x-geotiff")
IMAGE_ENDS = (".tif", ".tiff", ".jp2", ".vrt")
REMOTE = ("http://", "https://")


def read_items(uri: str) -> list[Mapping[str, Any]]:
    """Return the items of a STAC item collection, or the one item. Raises InputError."""
    try:
        value = files.read_json(uri)
    except FileNotFoundError as error:
        raise InputError(f"{uri} does not exist") from error
    except RunError as error:
        raise InputError(str(error)) from error
    found = value.get("features", [value]) if isinstance(value, dict) else []
    items: list[Mapping[str, Any]] = [
        item for item in found if isinstance(item, dict) and isinstance(item.get("assets"), dict)
    ]
    if not items or len(items) < len(found):
        raise InputError(
            f"{uri} is not a STAC item collection: it must hold features with assets (JSON)"
        )
    return items


def choose_assets(
    uri: str, item: Mapping[str, Any], assets: Sequence[str] | None = None
) -> list[str]:
    """Return the addresses of an item's image, or of its red, green and blue images.

    assets: the keys of one asset, or of three. None: `visual`, else the only image with the role
    `data` or without roles, else images for red, green and blue by key or common name. Relative
    addresses follow the JSON file. Raises InputError, with the keys that there are.
    """
    name = f"{uri}: item {item.get('id', '?')}"
    known = item["assets"]
    images = {key: asset for key, asset in known.items() if _is_image(asset)}
    keys = list(assets or _guess(images))
    absent = [key for key in keys if key not in known]
    if absent or len(keys) not in (1, 3):
        reason = f"has no asset {absent[0]}" if absent else "has no asset that must be the image"
        raise InputError(
            f"{name} {reason}; it has {', '.join(known) or 'none'}: name one image, or three for"
            " red, green and blue, as assets"
        )
    return [_resolve(name, uri, str(known[key].get("href", ""))) for key in keys]


def _guess(images: Mapping[str, Any]) -> list[str]:
    if "visual" in images:
        return ["visual"]
    data = [key for key, asset in images.items() if "data" in asset.get("roles", ["data"])]
    if len(data) == 1:
        return data
    by_color = {_color_of(key, images[key]): key for key in reversed(data)}
    return [by_color[color] for color in COLORS if color in by_color]


def _color_of(key: str, asset: Mapping[str, Any]) -> str | None:
    bands = asset.get("eo:bands") or asset.get("bands") or []
    if len(bands) == 1:
        return bands[0].get("common_name") or bands[0].get("eo:common_name") or key
    return key


def _is_image(asset: Any) -> bool:
    if not isinstance(asset, dict) or {"thumbnail", "metadata"} & set(asset.get("roles", [])):
        return False
    kind = str(asset.get("type", "")).lower()
    if kind:
        return kind.startswith(IMAGE_TYPES)
    return str(asset.get("href", "")).lower().endswith(IMAGE_ENDS)


def _resolve(name: str, uri: str, address: str) -> str:
    if not address:
        raise InputError(f"{name} has an asset without href")
    if address.startswith(REMOTE):
        raise InputError(
            f"{name} lies at {address}; download it, or give its s3:// address: imagery is read"
            " from files and object stores"
        )
    folder = uri.rpartition("/")[0]
    return files.absolute(files.join(folder, address.removeprefix("./")))


def open_item(
    addresses: Sequence[str], *, bands: Sequence[int] | None = None, nodata: float | None = None
) -> Raster:
    """Return the raster of an item: one image, or three of one band on the same pixels.

    Raises InputError when three images differ in size, place or type.
    """
    if len(addresses) == 1:
        return open_raster(addresses[0], bands=bands, nodata=nodata)
    if bands is not None:
        raise InputError(
            f"bands {list(bands)} are of one image; an item here has one for each color"
        )
    parts = [open_raster(address, bands=[1], nodata=nodata) for address in addresses]
    first = parts[0]
    for part in parts[1:]:
        if part.georeference != first.georeference or part.dtype != first.dtype:
            raise InputError(
                f"{part.uri} and {first.uri} differ in size, place or type of values; choose assets"
                " of the same resolution"
            )
    return replace(
        first,
        bands=tuple(part.bands[0] for part in parts),
        nodata=tuple(part.nodata[0] for part in parts),
        alphas=tuple(alpha for part in parts for alpha in part.alphas),
        masks=tuple(mask for part in parts for mask in part.masks),
        palette=None,
    )
