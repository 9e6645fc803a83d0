"""Write the rows of one view as Parquet parts, as they come, and check them."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from s4g_ray.data import schema
from s4g_ray.data.format.columns import conform, iterate_tables
from s4g_ray.data.format.header import DatasetPart
from s4g_ray.data.format.image_paths import Prefixes, shorten
from s4g_ray.data.format.rows_digest import RowsDigest
from s4g_ray.data.image_table import View
from s4g_ray.data.schema import SCHEMAS, list_part_names, with_optional
from s4g_ray.data.validation import BATCH_ROWS, ViewCheck
from s4g_ray.storage import files


class PartWriter:
    """Writes the parts of one view. At most a part, and the table that comes in, is in memory."""

    def __init__(self, folder: str, view: View, digest: RowsDigest, prefixes: Prefixes) -> None:
        """Write into the view's folder; the digest is updated by the rows of each part.

        prefixes: what absolute paths of images start with, and what is stored instead.
        """
        self.check = ViewCheck(view)
        self.parts: list[DatasetPart] = []
        self._folder = folder
        self._view = view
        self._digest = digest
        self._prefixes = prefixes
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0
        self._num_given = 0
        self._names: list[str] = []

    def write(self, rows: Any) -> None:
        """Write all rows: a table, or an iterable of tables or record batches.

        Removes parts that an interrupted attempt left; other files in the folder stay. Raises
        InputError for columns that do not fit, and for rows that are refused, once all were read.
        """
        for name in list_part_names(self._folder):
            files.remove(files.join(self._folder, name))
        for given in iterate_tables(rows):
            table = conform(given, self._view, self._num_given)
            number = table.column_names.index("uri")
            uris = shorten(table["uri"], self._prefixes)
            self._waiting.append(table.set_column(number, table.schema.field(number), uris))
            self._num_waiting += len(table)
            self._num_given += len(table)
            while self._num_waiting >= schema.ROWS_PER_PART:
                self._write_part()
        if self._num_waiting or not self._names:
            self._write_part()
        self.check.finish()

    def _write_part(self) -> None:
        """Check and write the first ROWS_PER_PART of the rows that wait."""
        empty = SCHEMAS[self._view].empty_table()
        tables = self._waiting or [conform(empty, self._view)]
        waiting = pa.concat_tables(tables, promote_options="default")
        # whole chunks: the bytes do not depend on the tables in which the rows came
        table = waiting.slice(0, schema.ROWS_PER_PART).combine_chunks()
        self._waiting = [waiting.slice(schema.ROWS_PER_PART)]
        self._num_waiting = len(self._waiting[0])
        name = schema.name_part(len(self._names))
        uri = files.join(self._folder, name)
        self.check.begin_file(uri)
        for batch in table.to_batches(max_chunksize=BATCH_ROWS):
            self.check.add(batch)
        self._names.append(name)
        if self.check.is_faulty:  # the rest is read for the message alone
            return
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        data = buffer.getvalue()
        files.write_bytes(uri, data)
        self._digest.update(self._view, table)
        path = f"{self._view}/{name}"
        self.parts.append(DatasetPart(path, len(table), len(data), files.fingerprint(data)))

    def open(self) -> Any:
        """Return the written parts as an Arrow data set."""
        filesystem, folder = files.filesystem_of(self._folder)
        paths = [f"{folder}/{name}" for name in self._names]
        parts = pads.dataset(paths, filesystem=filesystem, format="parquet")
        return parts.replace_schema(with_optional(parts.schema, self._view))

    def remove(self) -> None:
        """Remove the parts that were written."""
        for name in self._names:
            files.remove(files.join(self._folder, name))
