"""Describe a gallery: counts, sizes, extent, model and sources, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from s4g_ray.amounts import count_noun, format_bytes
from s4g_ray.errors import InputError
from s4g_ray.gallery.calibration import Calibration
from s4g_ray.gallery.store.header import GalleryHeader
from s4g_ray.gallery.store.tiles import Tiles, read_tiles, tiles_of
from s4g_ray.gallery.store.versions import Version, open_version
from s4g_ray.storage import files

SIZES = 8  # that are listed


def describe_gallery(uri: str) -> dict[str, Any]:
    """Return the facts about a gallery; reads neither its index nor its model.

    Raises InputError for a folder that is no gallery, and RunError for missing or altered files.
    """
    uri = files.absolute(uri)
    header = GalleryHeader.load(uri)
    version = open_version(uri, header.current)
    tiles = tiles_of(read_tiles(version.folder, version.parts, ("id", "lat", "lon", "size_m")))
    return describe_version(header, version, tiles)


def describe_version(header: GalleryHeader, version: Version, tiles: Tiles) -> dict[str, Any]:
    """Return the facts about a version; reads the calibration of the gallery, if there is one."""
    calibration = describe_calibration(version.gallery)
    info = version.info
    facts = version.facts
    return {
        "uri": version.gallery,
        "name": header.name,
        "version": version.number,
        "num_tiles": len(tiles),
        "size_m": list_sizes(tiles.size_m),
        "bounds": list(tiles.bounds()),
        "dim": header.dim,
        "dtype": header.dtype,
        "index": {
            **facts.summary(),
            "effort": facts.effort,
            "recall@10": facts.recall,
            "memory_gb": facts.memory_gb,
        },
        "model": dict(header.model),
        "copies_images": header.copies_images,
        "images_root": _find_images(header, version.gallery),
        "has_calibration": calibration is not None,
        "calibration": calibration,
        "sources": [dict(source) for source in header.sources],
        "attribution": header.attribution,
        "created": header.created,
        "updated": header.updated,
        "last_change": dict(info.get("change", {})),
    }


def _find_images(header: GalleryHeader, gallery: str) -> str | None:
    """Return the folder of the images; None for galleries whose paths of images are absolute."""
    if header.images_root is None and not header.copies_images:
        return None
    return header.find_images(gallery)


def describe_calibration(gallery: str) -> dict[str, Any] | None:
    """Return when a gallery was calibrated, and for which turns; None when it was not.

    For a file that cannot be read the entry `error` gives the reason.
    """
    try:
        found = Calibration.load(gallery)
    except InputError as error:
        return {"error": str(error)}
    if found is None:
        return None
    return {
        "turns": found.turns,
        "created": found.created,
        "gallery_version": found.gallery_version,
        "weights_sha256": found.weights_sha256,
    }


def list_sizes(size_m: Any) -> list[float]:
    """Return the sizes of tiles in metres, ascending; SIZES of them at most, unknown ones left out.

    Of more, the smallest and the largest.
    """
    known = np.unique(np.round(size_m[np.isfinite(size_m)], 3))
    if len(known) > SIZES:
        known = known[[0, -1]]
    return [float(size) for size in known]


def info_table(info: Mapping[str, Any]) -> Table:
    """Return the facts as a table for a terminal."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(info):
        table.add_row(Text(name), Text(value))
    return table


def _rows(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    west, south, east, north = info["bounds"]
    over = " over the antimeridian" if west > east else ""
    sizes = ", ".join(f"{size:g} m" for size in info["size_m"]) or "unknown"
    model = info["model"]
    index = info["index"]
    recall = "exact" if index["recall@10"] is None else f"recall@10 {index['recall@10']:.3f}"
    held = format_bytes(1e9 * index["memory_gb"])
    if index["is_sharded"]:
        shards = count_noun(index["num_shards"], "shard")
        held += f" in {shards} of {format_bytes(1e9 * index['shard_gb'])} on a Ray cluster"
    images = "at their source"
    if info["copies_images"]:
        images = "copied into the gallery"
    elif info["images_root"] is not None:
        images = f"in {info['images_root']}"
    rows = [
        ("gallery", f"{info['name']} ({info['uri']})"),
        ("version", f"{info['version']}, of {info['updated']}"),
        ("tiles", f"{info['num_tiles']:,}"),
        ("ground size", sizes),
        ("centres", f"{west:.5f}..{east:.5f} lon{over}, {south:.5f}..{north:.5f} lat"),
        (
            "model",
            f"{model['architecture']}, D={info['dim']}, weights {model['weights_sha256'][:12]}",
        ),
        ("index", f"{index['kind']}, {recall}, {held}"),
        ("images", images),
        ("calibration", _name_calibration(info["calibration"])),
    ]
    rows.extend(
        ("source", f"{one['name']} ({one['uri']}), {count_noun(one['tiles'], 'tile')} when added")
        for one in info["sources"]
    )
    if info["attribution"]:
        rows.append(("attribution", info["attribution"]))
    return rows


def _name_calibration(found: Mapping[str, Any] | None) -> str:
    """Return what a user must know of a calibration."""
    if found is None:
        return "none; see `s4g gallery calibrate`"
    if "error" in found:
        return str(found["error"])
    turns = found["turns"]
    searched = f"searches with --turns {turns}" if turns > 1 else "searches without --turns"
    made = f", of {found['created']}" if found["created"] else ""
    version = found["gallery_version"]
    return f"for {searched}{made}{'' if version is None else f', on version {version}'}"
