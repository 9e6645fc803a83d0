"""Cast tables to the schema of a view, from the types that pandas, polars or duckdb give.

What casts without loss is cast: smaller and unsigned integers, whole numbers in floating point or
decimals, large and dictionary-encoded strings, lists of any kind, extension types by their storage.
Whole numbers in floating point that may have been rounded are refused.
All else is refused with the column, the row, and the cast that helps.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s4g_ray.data.image_table import VIEWS, View
from s4g_ray.data.schema import OPTIONAL, SCHEMAS
from s4g_ray.errors import InputError

CAST_ROWS = 1_000_000  # of texts, cast at a time
_SHOWN = 60  # characters of a value in a message
_NAMES = {pa.int64(): "pa.int64()", pa.float64(): "pa.float64()", pa.float32(): "pa.float32()"}
_COUNTED = ("region", "source_id")  # texts that may be given as whole numbers
_EXACT_BITS = {16: 11, 32: 24, 64: 53}  # floating point of so many bits: of whole numbers


def iterate_tables(rows: Any) -> Iterator[pa.Table]:
    """Yield the tables of rows: a table, a record batch, a data frame, or an iterable of them.

    Raises InputError for other objects.
    """
    if isinstance(rows, pa.RecordBatchReader) or not _is_table(rows):
        if isinstance(rows, str | bytes | dict) or not hasattr(rows, "__iter__"):
            raise _refuse_rows(rows)
        for one in rows:
            if not _is_table(one):
                raise _refuse_rows(one)
            yield _to_table(one)
    else:
        yield _to_table(rows)


def _is_table(rows: Any) -> bool:
    return isinstance(rows, pa.Table | pa.RecordBatch) or hasattr(rows, "__arrow_c_stream__")


def _to_table(rows: Any) -> pa.Table:
    if isinstance(rows, pa.Table):
        return rows
    if isinstance(rows, pa.RecordBatch):
        return pa.Table.from_batches([rows])
    if hasattr(rows, "iloc"):  # pandas: its index numbers rows, and is no column
        return pa.Table.from_pandas(rows, preserve_index=False)
    return pa.table(rows)


def _refuse_rows(rows: Any) -> InputError:
    remedy = "give a pyarrow.Table, a data frame that exports Arrow, or an iterable of tables"
    if hasattr(rows, "collect"):  # a lazy frame of polars
        remedy = "collect it, as frame.collect()"
    elif isinstance(rows, dict):
        remedy = "give pyarrow.table(columns), or pyarrow.Table.from_pylist(rows) of a list of rows"
    return InputError(f"{type(rows).__name__} {_show(rows)} is no table: {remedy}")


def conform(table: pa.Table, view: View, first_row: int = 0) -> pa.Table:
    """Cast a table to the schema of its view, nulls for missing columns.

    An optional column is written where the table has it. first_row: the number of the first row, in
    messages. Raises InputError for columns that are unknown, repeated or missing, and for values
    that do not cast without loss.
    """
    _check_names(table.column_names, view)
    wanted = SCHEMAS[view]
    for field in OPTIONAL[view]:
        if field.name in table.column_names:
            wanted = wanted.append(field)
    columns = []
    for field in wanted:
        if field.name in table.column_names:
            columns.append(_cast(table[field.name], field, view, first_row))
        elif field.nullable:
            columns.append(pa.nulls(len(table), field.type))
        else:
            raise InputError(f"{view}: column {field.name!r} ({field.type}) is missing")
    return pa.table(columns, names=wanted.names)


def _check_names(names: list[str], view: View) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise InputError(f"{view}: column {repeated[0]!r} is there twice; drop one of the two")
    known = _list_columns(view)
    for name in names:
        if name not in known:
            raise InputError(f"{view}: unknown column {name!r}; {_find_remedy(name, view, known)}")


def _list_columns(view: View) -> list[str]:
    return [*SCHEMAS[view].names, *OPTIONAL[view].names]


def _find_remedy(name: str, view: View, known: list[str]) -> str:
    if name.startswith("__index_level_"):
        return "it is the index of a pandas frame: reset_index(drop=True)"
    near = difflib.get_close_matches(name.strip().lower(), known, n=1, cutoff=0.5)
    others = [other for other in VIEWS if other != view and name in _list_columns(other)]
    if others:
        return f"{others[0]} have such a column, {view} have none; drop it"
    if near:
        return f"did you mean {near[0]!r}? Rename it, or drop it"
    return f"drop it, or rename it to one of {', '.join(known)}"


def _cast(column: pa.ChunkedArray, field: pa.Field, view: View, first_row: int) -> pa.ChunkedArray:
    """Return a column of the wanted type. Raises InputError."""
    try:
        plain = _unwrap(column)
        if _is_castable(plain.type, field):
            is_other_text = _is_text(plain.type) and plain.type != field.type
            cast = _cast_texts(plain) if is_other_text else plain.cast(field.type)
            _check_exact(plain, field, view, first_row)
            return cast
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError) as error:
        raise _refuse_value(_unwrap(column), field, view, first_row, error) from error
    raise _refuse_type(column, field, view)


def _cast_texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cast texts to strings, in slices: a chunk of large ones may hold more than a string can."""
    chunks = []
    for chunk in column.chunks:
        for start in range(0, len(chunk), CAST_ROWS):
            # a copy: the cast refuses a slice whose bytes are far from the first
            texts = pa.concat_arrays([chunk.slice(start, CAST_ROWS)])
            chunks.append(texts.cast(pa.string()))
    return pa.chunked_array(chunks, pa.string())


def _check_exact(column: pa.ChunkedArray, field: pa.Field, view: View, first_row: int) -> None:
    """Raise InputError for whole numbers in floating point that are large enough to be rounded."""
    is_list = pa.types.is_list(field.type) and _is_list(column.type)
    kind, wanted = (one.value_type if is_list else one for one in (column.type, field.type))
    if not (pa.types.is_floating(kind) and pa.types.is_integer(wanted)):
        return
    bits = _EXACT_BITS[kind.bit_width]

    def are_rounded(numbers: Any) -> Any:
        return pc.greater_equal(pc.abs(numbers.cast(pa.float64())), 2.0**bits)

    if not pc.any(are_rounded(pc.list_flatten(column) if is_list else column)).as_py():
        return
    row = next(
        row
        for row, value in enumerate(column)
        if value.is_valid
        and pc.any(are_rounded(value.values if is_list else pa.array([value]))).as_py()
    )
    raise InputError(
        f"{view}: column {field.name!r}, row {first_row + row}: {_show(column[row].as_py())}"
        f" ({column.type}) may be rounded: whole numbers are exact below 2**{bits} alone; cast to"
        " integers before a join makes them floating point (pandas: Int64)"
    )


def _unwrap(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the storage of extension types, and the values of encoded ones."""
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        chunks = [chunk.storage for chunk in column.chunks]
        return _unwrap(pa.chunked_array(chunks, kind.storage_type))
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):  # pyarrow takes none
        large = pa.large_string() if pa.types.is_string_view(kind) else pa.large_binary()
        return column.cast(large)
    if pa.types.is_dictionary(kind):
        values = [_unwrap(pa.chunked_array([chunk.dictionary])) for chunk in column.chunks]
        chunks = [
            decoded.take(chunk.indices).combine_chunks()
            for decoded, chunk in zip(values, column.chunks, strict=True)
        ]
        return pa.chunked_array(chunks, None if chunks else kind.value_type)
    if pa.types.is_run_end_encoded(kind):
        if not column.num_chunks:
            return _unwrap(pa.chunked_array([], kind.value_type))
        return pa.chunked_array([_decode_runs(chunk) for chunk in column.chunks])
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        chunks = [_unview(chunk) for chunk in column.chunks]
        return pa.chunked_array(chunks, pa.large_list(kind.value_type))
    return column


def _decode_runs(runs: pa.Array) -> pa.Array:
    """Return the values of a run-end-encoded array; pyarrow 26 decodes none of views, for one."""
    rows = np.arange(runs.offset, runs.offset + len(runs))
    numbers = np.searchsorted(runs.run_ends.to_numpy(), rows, side="right")
    values = _unwrap(pa.chunked_array([runs.values]))
    return values.take(pa.array(numbers)).combine_chunks()


def _unview(lists: pa.Array) -> pa.Array:
    """Return list views as lists: pyarrow 26 casts those with nulls into invalid arrays."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    bounds = pa.array(np.concatenate(([0], np.cumsum(lengths))), pa.int64())
    values = pc.list_flatten(lists)
    return pa.LargeListArray.from_arrays(bounds, values, mask=pc.is_null(lists))


def _is_castable(kind: pa.DataType, field: pa.Field) -> bool:
    """Whether values of a type may be those of a field; single ones may still not fit."""
    if pa.types.is_null(kind):
        return True
    if pa.types.is_list(field.type):
        return _is_list(kind) and _is_number(kind.value_type)
    if pa.types.is_string(field.type):
        return _is_text(kind) or (field.name in _COUNTED and pa.types.is_integer(kind))
    return _is_number(kind)


def _is_number(kind: pa.DataType) -> bool:
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return bool(is_number or pa.types.is_null(kind))


def _is_text(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    binaries = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(test(kind) for test in (*tests, *binaries))


def _is_list(kind: pa.DataType) -> bool:
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    views = (pa.types.is_list_view, pa.types.is_large_list_view)
    return any(test(kind) for test in (*tests, *views))


def _refuse_type(column: pa.ChunkedArray, field: pa.Field, view: View) -> InputError:
    kind = column.type
    start = f"{view}: column {field.name!r} is {kind}, but must be {field.type}"
    if pa.types.is_struct(kind):
        names = [kind.field(number).name for number in range(kind.num_fields)]
        help_ = f'take one of its fields: pc.struct_field(table["{field.name}"], {names[:1]})'
    elif pa.types.is_string(field.type):
        help_ = f'cast it: table["{field.name}"].cast(pa.string())'
    elif pa.types.is_list(field.type):
        help_ = "give lists of whole numbers, or null"
    else:
        help_ = f'cast it: table["{field.name}"].cast({_NAMES[field.type]})'
    return InputError(f"{start}; {help_}")


def _refuse_value(
    column: pa.ChunkedArray, field: pa.Field, view: View, first_row: int, error: Exception
) -> InputError:
    """Return the error of the first row that does not cast, with the cast that helps."""
    row = _find_first_failing(column, field.type)
    value = column[row].as_py() if not _is_text(column.type) else _read_text(column[row])
    start = (
        f"{view}: column {field.name!r}, row {first_row + row}: {_show(value)} ({column.type}) is"
        f" no {field.type}"
    )
    if pa.types.is_string(field.type):
        return InputError(f"{start}: {error}; give names as UTF-8 text")
    if pa.types.is_list(field.type):
        return InputError(f"{start}; give whole numbers below 2**63")
    if value != value:  # NaN
        return InputError(
            f'{start}; drop such rows, or number them: pc.if_else(pc.is_nan(table["{field.name}"]),'
            f' -1, table["{field.name}"])'
        )
    if pa.types.is_floating(column.type) or pa.types.is_decimal(column.type):
        return InputError(
            f'{start}; round it: pc.round(table["{field.name}"]).cast({_NAMES[field.type]})'
        )
    return InputError(f"{start}; it is too large: give numbers below 2**63")


def _find_first_failing(column: pa.ChunkedArray, kind: pa.DataType) -> int:
    """Return the first row whose value does not cast to a type, by halving."""
    low, high = 0, len(column)  # rows before low cast; one of low..high - 1 does not
    while high - low > 1:
        middle = (low + high) // 2
        try:
            # not a slice, whose cast would check the values of all lists
            column.take(pa.array(np.arange(low, middle))).cast(kind)
            low = middle
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            high = middle
    return low


def _read_text(value: Any) -> Any:
    """Return a string, or the bytes of one that is not UTF-8."""
    return value.as_buffer().to_pybytes()


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
