"""Open parts as Parquet, and refuse extension types: their values may be pickled objects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from s4g_ray.errors import RunError, StoreError
from s4g_ray.storage.manifest import Part, altered, open_part


@contextmanager
def open_parquet_part(folder: str, part: Part, **options: Any) -> Iterator[pq.ParquetFile]:
    """Open a part of a published folder as a pq.ParquetFile, to read pieces of it in the block.

    Raises RunError as open_part does, and where Parquet finds it cut short or damaged; StoreError
    when the object store fails.
    """
    with open_part(folder, part) as file:
        try:
            yield pq.ParquetFile(file, **options)
        except StoreError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise altered(folder, part) from error


def refuse_extension_types(table: pa.Table, uri: str) -> pa.Table:
    """Return a table that was read from `uri`, after a check of its types; reads no values.

    Raises RunError for a column of an extension type, at the top level or nested. Ray's extension
    types are known to every process that has imported Ray Data, and reading their values unpickles
    them: it would run code that the file's writer chose.
    """
    for field in table.schema:
        extension = extension_in(field.type)
        if extension is not None:
            raise RunError(
                f"{uri}: column {field.name!r} has the extension type {extension}, which is not"
                " read because it may hold pickled objects; remove the file and make it again"
            )
    return table


def extension_in(kind: pa.DataType) -> str | None:
    """Return the name of the first extension type in a type, nested types included."""
    if isinstance(kind, pa.BaseExtensionType):
        return str(kind.extension_name)
    if pa.types.is_dictionary(kind):
        inner = [kind.value_type]
    else:
        inner = [kind.field(i).type for i in range(kind.num_fields)]
    for inner_kind in inner:
        extension = extension_in(inner_kind)
        if extension is not None:
            return extension
    return None
