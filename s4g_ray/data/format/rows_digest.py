"""Define RowsDigest: the fingerprint of the rows of a data set, wherever their images are."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s4g_ray.data.image_table import View

# source_id is for people: it does not change what a run computes
_NUMBERS = ("id", "place_id", "offset", "length", "lat", "lon", "size_m", "heading_deg")
_TEXTS = ("uri", "split", "region")
# the folders of images that are not below the images' folder may be others after a move: of paths
# beside it only `../` is left out, of absolute ones all but the last folder and the name
_UP = r"^(?:\.\./)+"
_IS_ABSOLUTE = r"^/|://"
_LAST_TWO = r"(?s)^(?:/|[^/]*://)(?:.*/)?([^/]+/+[^/]*)$"


class RowsDigest:
    """Computes a sha256 of ids, places, coordinates, splits, image names and sizes of rows.

    Does not depend on where the data set is, on the folder of images that moves with it or is given
    anew, nor on the bytes of Parquet files. Of an absolute path the last folder and the name count.
    So the rows of two data sets may be equal where their folders alone differ, as 2019/tiles/1.png
    and 2021/tiles/1.png: the data set's name counts too, which stays when it moves.
    """

    def __init__(self, name: str) -> None:
        self._digest = hashlib.sha256(f"{name}\n".encode(errors="surrogatepass"))

    def update(self, view: View, table: pa.Table) -> None:
        """Add the rows of a part."""
        self._digest.update(f"{view} {len(table)}\n".encode())
        for name in _NUMBERS:
            if name in table.column_names:
                self._add_numbers(name, table[name])
        for name in _TEXTS:
            self._add_texts(name, table[name])
        if "semi_positives" in table.column_names:
            lists = table["semi_positives"]
            lengths = pc.fill_null(pc.list_value_length(lists), 0)
            self._add_array("semi_positives", lengths.to_numpy())
            self._add_array("places", pc.fill_null(pc.list_flatten(lists), -1).to_numpy())

    def hexdigest(self) -> str:
        """Return the fingerprint."""
        return self._digest.hexdigest()

    def _add_numbers(self, name: str, column: pa.ChunkedArray) -> None:
        if column.null_count == len(column):
            return  # as without the column
        self._add_array(name, pc.fill_null(column, 0).to_numpy())
        if column.null_count:
            self._add_array("null", np.packbits(pc.is_null(column).to_numpy()))

    def _add_texts(self, name: str, column: pa.ChunkedArray) -> None:
        if column.null_count == len(column):
            return
        if name == "uri":
            if pc.any(pc.starts_with(column, "../")).as_py():
                column = pc.replace_substring_regex(column, _UP, "")
            if pc.any(pc.match_substring_regex(column, _IS_ABSOLUTE)).as_py():
                column = pc.replace_substring_regex(column, _LAST_TWO, r"\1")
        lengths = pc.fill_null(pc.binary_length(column), -1)
        self._add_array(name, lengths.to_numpy())
        for chunk in pc.fill_null(column, "").cast(pa.large_binary()).chunks:
            _, bounds, heap = chunk.buffers()
            if heap is None or not len(chunk):
                continue
            ends = np.frombuffer(bounds, np.int64)[chunk.offset :][: len(chunk) + 1]
            self._digest.update(memoryview(heap)[ends[0] : ends[-1]])

    def _add_array(self, name: str, values: Any) -> None:
        array = np.ascontiguousarray(values)
        self._digest.update(f"{name} {array.dtype.str}\n".encode())
        self._digest.update(array.tobytes())
