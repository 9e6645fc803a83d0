"""Read a list of images in chunks of rows: CSV with a header, or Parquet.

Blocks of CSV without quotes are split and parsed by Arrow. A block that holds anything else, and
all rows from the first quote on, are read by the csv module: it decides what CSV is, and knows the
line of each row. Every error names the file and the line, or the row of a Parquet file.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from s4g_ray.data.image_table import View
from s4g_ray.datasets.lists.dialects import (
    SAMPLE_BYTES,
    SAMPLE_ROWS,
    Dialect,
    decode_sample,
    is_hint,
    sample_rows,
)
from s4g_ray.datasets.lists.list_columns import ListColumns, ListedChunk
from s4g_ray.datasets.lists.list_options import ListOptions
from s4g_ray.errors import InputError, StoreError
from s4g_ray.storage.parquet import refuse_extension_types

BLOCK_BYTES = 8_000_000  # of CSV that are parsed at once
NUMBERS = ("lat", "lon", "heading")
BATCH_ROWS = 100_000  # rows of the csv module or of Parquet that are parsed at once


class CsvList:
    """A CSV file with a header, read once, in chunks."""

    unit = "line"

    def __init__(self, uri: str, stream: Any, view: View, options: ListOptions) -> None:
        self.uri = uri
        self.columns: ListColumns | None = None  # once the header is read
        self.dialect = Dialect()  # likewise
        self._sample = ""  # the start of the file
        self._stream = stream
        self._view = view
        self._options = options
        self._line = 0  # lines of the blocks before
        self._num_rows = 0

    def read(self) -> Iterator[ListedChunk]:
        """Yield all rows. Raises InputError for missing columns, bad values and a file without."""
        blocks = self._read_blocks()
        for block in blocks:
            if self.columns is None:
                block = self._read_header(block)
            if not is_plain(block):
                yield from self._parse_rows(chain([block], blocks))
                break
            chunk = self._parse_block(block)
            if chunk is None:
                yield from self._parse_rows([block])
                continue
            self._line += len(chunk.numbers)
            self._num_rows += len(chunk.numbers)
            yield chunk
        if not self._num_rows:
            raise InputError(
                f"{self.uri}, line {self._line + 1}: the file ends without a row; list the"
                f" {self._view} in it"
            )

    def describe(self) -> list[str]:
        """Return how the file is written, where it is not UTF-8 with commas and points."""
        numbers = self.columns.numbers.describe() if self.columns is not None else []
        return [*self.dialect.describe(), *numbers]

    def _read_blocks(self) -> Iterator[bytes]:
        """Yield blocks of whole lines, without the byte-order mark of the file."""
        sample = self._stream.read(SAMPLE_BYTES)
        self._stream.seek(0)
        self.dialect = Dialect.from_sample(sample, self._view, self._options)
        self._sample = decode_sample(sample, self.dialect.encoding)
        chunks = self._read_chunks()
        rest = next(chunks, b"")
        while rest:
            more = next(chunks, b"")
            end = rest.rfind(b"\n") + 1 if more else len(rest)
            if end:
                yield rest[:end]
            rest = rest[end:] + more

    def _read_chunks(self) -> Iterator[bytes]:
        try:
            yield from self.dialect.read_chunks(self._stream, BLOCK_BYTES)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.uri} begins as {self.dialect.encoding} text, and is not: {error.reason};"
                " save it as UTF-8"
            ) from error

    def _read_header(self, block: bytes) -> bytes:
        """Find the columns in the first row that is not blank; return the lines after it."""
        lines = io.StringIO(self._decode(block), newline="")
        num_bytes = 0

        def count_bytes() -> Iterator[str]:
            nonlocal num_bytes
            for line in lines:
                num_bytes += len(line.encode())
                yield line

        before = self._line
        for _, fields in self._read_rows(count_bytes(), before):
            if is_hint(fields, self.dialect.delimiter):
                continue
            names = [field.strip() for field in fields]
            location = f"{self.uri}, line {self._line}"
            columns = ListColumns.find(location, names, self._view, self._options)
            rows = sample_rows(self._sample, self.dialect.delimiter)[1:]
            sample = {
                kind: [row[column].strip() for row in rows if column < len(row)]
                for kind, column in columns.index.items()
            }
            self.columns = columns.with_sample(sample, self._options)
            break
        return block[num_bytes:]

    def _read_rows(self, lines: Iterator[str], before: int) -> Iterator[tuple[int, list[str]]]:
        """Yield rows that are not blank, each with its line; `before`: lines before the first."""
        reader = csv.reader(lines, strict=True, delimiter=self.dialect.delimiter)
        try:
            for fields in reader:
                self._line = before + reader.line_num
                if any(field.strip() for field in fields):
                    yield self._line, fields
        except csv.Error as error:
            location = f"{self.uri}, line {before + reader.line_num}"
            raise InputError(f"{location}: not CSV: {error}") from error
        self._line = before + reader.line_num

    def _parse_block(self, block: bytes) -> ListedChunk | None:
        """Parse plain lines by Arrow; return None where the rows are for the csv module."""
        if self.columns is None or not block:
            return None
        names = [str(number) for number in range(len(self.columns.names))]
        wanted = {kind: names[column] for kind, column in self.columns.index.items()}
        try:
            table = pacsv.read_csv(
                pa.BufferReader(block),
                pacsv.ReadOptions(column_names=names, block_size=len(block) + 1),
                pacsv.ParseOptions(
                    delimiter=self.dialect.delimiter, quote_char=False, double_quote=False
                ),
                pacsv.ConvertOptions(
                    include_columns=sorted(set(wanted.values())),
                    column_types=dict.fromkeys(names, pa.string()),
                    strings_can_be_null=False,
                ),
            )
        except pa.ArrowInvalid:
            return None
        if len(table) != block.count(b"\n") + (not block.endswith(b"\n")):
            return None  # with blank lines: the csv module knows the line of each row
        columns = {kind: table[name].combine_chunks() for kind, name in wanted.items()}
        numbers = np.arange(len(table)) + self._line + 1
        return self.columns.parse_columns(columns, numbers, self._num_rows)

    def _parse_rows(self, blocks: Iterable[bytes]) -> Iterator[ListedChunk]:
        """Parse the rows of blocks that the csv module splits."""
        lines = (line for block in blocks for line in io.StringIO(self._decode(block), newline=""))
        rows = self._read_rows(lines, self._line)
        is_over = False
        while not is_over:
            batch: list[tuple[int, list[str]]] = []
            try:
                batch.extend(islice(rows, BATCH_ROWS))
            except InputError:
                if batch:
                    self._parse_batch(batch)  # a row before may be refused
                raise
            is_over = len(batch) < BATCH_ROWS
            if batch:
                yield self._parse_batch(batch)

    def _parse_batch(self, batch: list[tuple[int, list[str]]]) -> ListedChunk:
        """Parse rows that are split, each with its line."""
        columns = self.columns
        assert columns is not None
        first_id = self._num_rows
        self._num_rows += len(batch)
        if all(len(fields) == len(columns.names) for _, fields in batch):
            texts = {
                kind: pa.array([fields[column] for _, fields in batch], pa.string())
                for kind, column in columns.index.items()
            }
            numbers = np.array([number for number, _ in batch], dtype=np.int64)
            chunk = columns.parse_columns(texts, numbers, first_id)
            if chunk is not None:
                return chunk
        parsed = []
        for row, (number, fields) in enumerate(batch):
            location = f"{self.uri}, line {number}"
            parsed.append(columns.parse_row(location, fields, first_id + row))
        return columns.join_rows([number for number, _ in batch], parsed)

    def _decode(self, block: bytes) -> str:
        try:
            return block.decode()
        except UnicodeDecodeError as error:
            line = self._line + 1 + block[: error.start].count(b"\n")
            raise InputError(
                f"{self.uri} is not UTF-8 text: line {line}: {error.reason}"
                f" ({block[error.start : error.end]!r}); save it as UTF-8"
            ) from error


def is_plain(block: bytes) -> bool:
    """Return whether a block of CSV needs no rules but those of delimiters and line ends."""
    if b'"' in block or b"\0" in block:
        return False
    return b"\r" not in block or block.count(b"\r") == block.count(b"\r\n")


class ParquetList:
    """A Parquet file, read once, in chunks."""

    unit = "row"

    def __init__(self, uri: str, stream: Any, view: View, options: ListOptions) -> None:
        self.uri = uri
        self.columns: ListColumns | None = None
        self._stream = stream
        self._view = view
        self._options = options

    def read(self) -> Iterator[ListedChunk]:
        """Yield all rows. Raises InputError for missing columns, bad values and a file without."""
        first = 0
        try:
            with pq.ParquetFile(self._stream, pre_buffer=True) as parquet:
                schema = parquet.schema_arrow
                refuse_extension_types(schema.empty_table(), self.uri)
                names = schema.names
                columns = ListColumns.find(self.uri, names, self._view, self._options)
                shown = [columns.name(kind) for kind in NUMBERS if kind in columns.index]
                sample = next(parquet.iter_batches(SAMPLE_ROWS, columns=shown), None)
                self.columns = self._with_sample(columns, sample)
                wanted = sorted({names[column] for column in self.columns.index.values()})
                for batch in parquet.iter_batches(BATCH_ROWS, columns=wanted):
                    yield self._parse_batch(self.columns, batch, first)
                    first += batch.num_rows
        except StoreError:
            raise
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise InputError(f"{self.uri} is not a readable Parquet file: {error}") from error
        if not first:
            raise InputError(f"{self.uri} holds no row; list the {self._view} in it")

    def describe(self) -> list[str]:
        """Return how numbers are written, where it is not in degrees with points."""
        return self.columns.numbers.describe() if self.columns is not None else []

    def _with_sample(self, columns: ListColumns, batch: pa.RecordBatch | None) -> ListColumns:
        """Find the number format by the first rows."""
        if batch is None:
            return columns
        sample = {
            kind: [
                "" if value is None else str(value).strip()
                for value in batch[columns.name(kind)].to_pylist()
            ]
            for kind in NUMBERS
            if kind in columns.index
        }
        return columns.with_sample(sample, self._options)

    def _parse_batch(self, columns: ListColumns, batch: pa.RecordBatch, first: int) -> ListedChunk:
        numbers = np.arange(batch.num_rows) + first
        given = {kind: batch[columns.name(kind)] for kind in columns.index}
        chunk = columns.parse_columns(given, numbers, first)
        if chunk is not None:
            return chunk
        rows = []
        for number, values in zip(numbers.tolist(), batch.to_pylist(), strict=True):
            texts = [values.get(name) for name in columns.names]
            fields = ["" if text is None else str(text) for text in texts]
            rows.append(columns.parse_row(f"{self.uri}, row {number}", fields, number))
        return columns.join_rows(numbers.tolist(), rows)
