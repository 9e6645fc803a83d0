"""Write the rows of one view as Parquet parts, as they come, and check them."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from s4g_ray.data import schema
from s4g_ray.data.image_table import View
from s4g_ray.data.schema import OPTIONAL, SCHEMAS, list_part_names, with_optional
from s4g_ray.data.validation import BATCH_ROWS, ViewCheck
from s4g_ray.errors import InputError
from s4g_ray.storage import files


class PartWriter:
    """Writes the parts of one view. At most a part, and the table that comes in, is in memory."""

    def __init__(self, folder: str, view: View, digest: Any) -> None:
        """`digest` of hashlib is updated by the contents of each part."""
        self.check = ViewCheck(view)
        self._folder = folder
        self._view = view
        self._digest = digest
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0
        self._names: list[str] = []

    def write(self, tables: Iterable[pa.Table | pa.RecordBatch]) -> None:
        """Write all rows. Raises InputError for rows that are refused, once all were read.

        Removes parts that an interrupted attempt left; other files in the folder stay.
        """
        for name in list_part_names(self._folder):
            files.remove(files.join(self._folder, name))
        for given in tables:
            table = given if isinstance(given, pa.Table) else pa.Table.from_batches([given])
            table = conform(table, self._view)
            self._waiting.append(table)
            self._num_waiting += len(table)
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
        files.write_bytes(uri, buffer.getvalue())
        self._digest.update(buffer.getvalue())

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


def conform(table: pa.Table, view: View) -> pa.Table:
    """Cast a table to the schema of its view, nulls for missing columns. Raises InputError.

    An optional column is written where the table has it.
    """
    columns = []
    wanted = SCHEMAS[view]
    for field in OPTIONAL[view]:
        if field.name in table.column_names:
            wanted = wanted.append(field)
    for field in wanted:
        if field.name in table.column_names:
            try:
                columns.append(table[field.name].cast(field.type))
            except pa.ArrowInvalid as error:
                raise InputError(
                    f"{view}: column {field.name!r} is not {field.type}: {error}"
                ) from error
        elif field.nullable:
            columns.append(pa.nulls(len(table), field.type))
        else:
            raise InputError(f"{view}: column {field.name!r} ({field.type}) is missing")
    return pa.table(columns, names=wanted.names)
