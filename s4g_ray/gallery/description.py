"""Describe a gallery: counts, sizes, extent, model and sources, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from s4g_ray.gallery.gallery import Snapshot

SIZES = 8  # that are listed


def describe_snapshot(uri: str, snapshot: Snapshot, *, has_calibration: bool) -> dict[str, Any]:
    """Return the facts about an opened version."""
    header = snapshot.header
    info = snapshot.version.info
    return {
        "uri": uri,
        "name": header.name,
        "version": snapshot.version.number,
        "num_tiles": len(snapshot.tiles),
        "size_m": list_sizes(snapshot.tiles.size_m),
        "bounds": list(snapshot.tiles.bounds()),
        "dim": header.dim,
        "dtype": header.dtype,
        "index": {
            "kind": snapshot.index.kind,
            "effort": snapshot.index.effort,
            "recall@10": info.get("recall"),
            "memory_gb": snapshot.index.plan.memory_gb,
        },
        "model": dict(header.model),
        "copies_images": header.copies_images,
        "has_calibration": has_calibration,
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
        ("index", f"{index['kind']}, {recall}, {index['memory_gb']:.3g} GB"),
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
