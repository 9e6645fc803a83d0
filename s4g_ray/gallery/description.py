"""Describe a gallery: counts, sizes, extent, model and sources, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from s4g_ray.gallery.store.header import CALIBRATION, GalleryHeader
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
    """Return the facts about a version; asks the store for a calibration."""
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
        "has_calibration": files.exists(files.join(version.gallery, CALIBRATION)),
        "sources": [dict(source) for source in header.sources],
        "attribution": header.attribution,
        "created": header.created,
        "updated": header.updated,
        "last_change": dict(info.get("change", {})),
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
    sizes = ", ".join(f"{size:g} m" for size in info["size_m"]) or "unknown"
    model = info["model"]
    index = info["index"]
    recall = "exact" if index["recall@10"] is None else f"recall@10 {index['recall@10']:.3f}"
    held = f"{index['memory_gb']:.3g} GB"
    if index["is_sharded"]:
        held += f" in {index['num_shards']} shards of {index['shard_gb']:.3g} GB on a Ray cluster"
    calibration = "yes" if info["has_calibration"] else "none; see `s4g gallery calibrate`"
    images = "copied into the gallery" if info["copies_images"] else "at their source"
    rows = [
        ("gallery", f"{info['name']} ({info['uri']})"),
        ("version", f"{info['version']}, of {info['updated']}"),
        ("tiles", f"{info['num_tiles']:,}"),
        ("ground size", sizes),
        ("centres", f"{west:.5f}..{east:.5f} lon, {south:.5f}..{north:.5f} lat"),
        (
            "model",
            f"{model['architecture']}, D={info['dim']}, weights {model['weights_sha256'][:12]}",
        ),
        ("index", f"{index['kind']}, {recall}, {held}"),
        ("images", images),
        ("calibration", calibration),
    ]
    rows.extend(
        ("source", f"{one['name']} ({one['uri']}), {one['tiles']:,} tiles")
        for one in info["sources"]
    )
    if info["attribution"]:
        rows.append(("attribution", info["attribution"]))
    return rows
