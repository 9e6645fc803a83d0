"""Write dataset.json anew for parts that a test has changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from s4g_ray.data.format.header import DatasetHeader, DatasetPart
from s4g_ray.data.image_table import VIEWS
from s4g_ray.storage import files


def reseal(folder: Path | str) -> None:
    """List the parts as they are now; the fingerprint stays."""
    folder = Path(folder)
    parts = []
    for view in VIEWS:
        for path in sorted((folder / view).glob("part-*.parquet")):
            data = path.read_bytes()
            rows = pq.read_metadata(path).num_rows
            name = f"{view}/{path.name}"
            parts.append(DatasetPart(name, rows, len(data), files.fingerprint(data)))
    header = DatasetHeader.read(str(folder))
    replace(header, parts=tuple(parts)).write(str(folder))
