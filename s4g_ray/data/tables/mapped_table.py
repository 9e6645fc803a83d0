"""Write an ImageTable as files, and map it from them: processes that map it share its memory.

A mapped table is a folder: an .npy file for each array, and table.json, which is written last. Its
pages belong to the page cache of the operating system: they are read when they are first used, and
given up when memory runs short.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s4g_ray.data.image_table import ImageTable
from s4g_ray.data.pixels.image_values import ImageValues
from s4g_ray.data.tables.text_column import TextColumn

HEADER = "table.json"
_COLUMNS = ("ids", "place_ids", "offsets", "lengths", "lat", "lon", "headings", "sizes")
_TEXTS = ("uris", "regions")


class DamagedTableError(Exception):
    """A mapped table whose files are missing, cut short or not those of its header."""


def count_bytes(table: ImageTable) -> int:
    """Return the bytes of the files of a table, within 1 %."""
    return sum(_stored(array).nbytes for array in _list_arrays(table).values())


def write_table(folder: Path, table: ImageTable) -> None:
    """Write a table into a new folder, and wait until it is on the disk. Raises OSError."""
    folder.mkdir()
    arrays = _list_arrays(table)
    for name, array in arrays.items():
        with (folder / f"{name}.npy").open("wb") as file:
            np.save(file, _stored(array), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
    header = {
        "rows": len(table),
        "arrays": {name: [str(array.dtype), len(array)] for name, array in arrays.items()},
        "prefixes": {name: getattr(table, name).prefix for name in _TEXTS},
        "values": [table.values.stretch, table.values.bands],
    }
    with (folder / HEADER).open("w") as file:
        json.dump(header, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def map_table(folder: Path) -> ImageTable:
    """Map a table from its folder; its arrays are read-only.

    Raises FileNotFoundError for a folder without a header, DamagedTableError where the files are
    not those of the header.
    """
    text = (folder / HEADER).read_text()
    try:
        header = json.loads(text)
        arrays = {name: _map_array(folder, name, *kind) for name, kind in header["arrays"].items()}
        columns: dict[str, Any] = {name: arrays[name] for name in _COLUMNS}
        for name in _TEXTS:
            columns[name] = TextColumn(
                header["prefixes"][name],
                arrays[f"{name}.heap"],
                arrays[f"{name}.bounds"],
                arrays.get(f"{name}.codes"),
            )
        stretch, bands = header["values"]
        values = ImageValues(stretch, None if bands is None else tuple(bands))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedTableError(f"{folder}: {error}") from error
    table = ImageTable(**columns, values=values)
    for name, column in columns.items():
        if len(column) != len(table):
            raise DamagedTableError(f"{folder}: {len(column)} {name} of {len(table)} rows")
    return table


def _list_arrays(table: ImageTable) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {name: getattr(table, name) for name in _COLUMNS}
    for name in _TEXTS:
        column: TextColumn = getattr(table, name)
        arrays[f"{name}.heap"] = column.heap
        arrays[f"{name}.bounds"] = column.bounds
        if column.codes is not None:
            arrays[f"{name}.codes"] = column.codes
    return arrays


def _stored(array: NDArray[Any]) -> NDArray[Any]:
    """Return what is stored of an array: one value of those that numpy.broadcast_to has made."""
    return array[:1] if array.strides == (0,) else array


def _map_array(folder: Path, name: str, dtype: str, length: int) -> NDArray[Any]:
    """Map an array of the header. Raises ValueError where the file holds another."""
    path = folder / f"{name}.npy"
    array: NDArray[Any] = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    if str(array.dtype) != dtype or array.shape not in ((length,), (1,)):
        raise ValueError(f"{path.name} holds {array.dtype} {array.shape}, not {dtype} ({length},)")
    return array if len(array) == length else np.broadcast_to(array, length)
