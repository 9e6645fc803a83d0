"""Parquet tables from storage: columns of Arrow's own types alone."""

from __future__ import annotations

import pyarrow as pa

from s4g_ray.errors import RunError


def refuse_extension_types(table: pa.Table, uri: str) -> pa.Table:
    """A table that was read, its values not looked at yet.

    Raises RunError for a column of an extension type, outermost or within: who reads values of Ray's, which any process
    knows that has imported Ray Data, unpickles them, and so runs what the file's writer wanted run.
    """
    for field in table.schema:
        if (found := extension_in(field.type)) is not None:
            raise RunError(
                f"{uri}: column {field.name!r} is of the extension type {found}, and is not read: it may"
                " hold pickled objects; remove it and make it anew"
            )
    return table


def extension_in(kind: pa.DataType) -> str | None:
    """The name of the first extension type in a type."""
    if isinstance(kind, pa.BaseExtensionType):
        return str(kind.extension_name)
    inner = (
        [kind.value_type]
        if pa.types.is_dictionary(kind)
        else [kind.field(i).type for i in range(kind.num_fields)]
    )
    return next((found for found in map(extension_in, inner) if found is not None), None)
