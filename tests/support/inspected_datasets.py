"""Write small data sets to inspect, and pick findings."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from s4g_ray.data.dataset import write_dataset
from s4g_ray.data.image_table import View
from s4g_ray.datasets.inspection.findings import Finding, Inspection

NUM_TRAIN = 6
NUM_TEST = 4
Tables = dict[View, dict[str, Any]]


def clean_tables() -> Tables:
    """Make ten places on a line of latitude, about 1.1 km apart.

    A query is 11 m north of its reference.
    """
    count = NUM_TRAIN + NUM_TEST
    tables: Tables = {}
    norths: dict[View, float] = {"references": 0.0, "queries": 1e-4}
    for view, north in norths.items():
        tables[view] = {
            "id": list(range(count)),
            "place_id": [100 + i for i in range(count)],
            "uri": [f"{view}/{i}.png" for i in range(count)],
            "lat": [north] * count,
            "lon": [0.01 * i for i in range(count)],
            "split": ["train"] * NUM_TRAIN + ["test"] * NUM_TEST,
        }
    return tables


def draw_image(path: Path, size: tuple[int, int] = (12, 8)) -> None:
    """Save an image that no other path has, of (width, height) pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    color = tuple(hashlib.sha256(str(path).encode()).digest()[:3])
    image = Image.new("RGB", size, color)
    image.putpixel((1, 1), tuple(255 - value for value in color))
    image.save(path)


def write_small(folder: Path, tables: Tables, name: str = "small", *, images: bool = True) -> str:
    """Write a data set, and an image for each relative uri that has none. Returns its uri."""
    if images:
        for table in tables.values():
            for uri in table["uri"]:
                if "://" not in uri and not (folder / uri).exists():
                    draw_image(folder / uri)
    return write_tables(str(folder), tables, name)


def write_tables(uri: str, tables: Tables, name: str) -> str:
    return write_dataset(
        uri, pa.table(tables["references"]), pa.table(tables["queries"]), name=name
    ).uri


def only_finding(inspection: Inspection, topic: str, level: str) -> Finding:
    """Return the only finding of a topic and level."""
    (finding,) = [f for f in inspection.findings if (f.topic, f.level) == (topic, level)]
    return finding


def levels_of(inspection: Inspection) -> set[str]:
    return {finding.level for finding in inspection.findings}
