"""Find how a CSV file is written: its encoding, line ends and delimiter."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from s4g_ray.data.image_table import View
from s4g_ray.datasets.lists.column_names import list_matches, name_columns
from s4g_ray.datasets.lists.list_options import ListOptions

SAMPLE_BYTES = 1 << 16
SAMPLE_ROWS = 500
DELIMITERS = (",", ";", "\t", "|")  # the first of those that fit equally well
# a line that tells Excel the delimiter of the file
_HINT = re.compile(r"\s*sep=(.)\s*", re.IGNORECASE)
# the longer marks first: UTF-32 begins as UTF-16 does
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class Dialect:
    """How a CSV file is written. ends_with_cr: its lines end with CR alone."""

    encoding: str = "utf-8"
    ends_with_cr: bool = False
    delimiter: str = ","

    @classmethod
    def from_sample(cls, sample: bytes, view: View, options: ListOptions) -> Dialect:
        """Find the dialect by the first SAMPLE_BYTES of a list, and the columns that it needs."""
        encoding = find_encoding(sample)
        text = decode_sample(sample, encoding)
        ends_with_cr = "\r" in text.rstrip("\r") and "\n" not in text
        delimiter = options.delimiter or find_delimiter(text, view, options)
        return cls(encoding, ends_with_cr, delimiter)

    def describe(self) -> list[str]:
        """Return what differs from UTF-8 with commas."""
        found = []
        if self.encoding != "utf-8":
            found.append(f"the text is {self.encoding.upper()}")
        if self.delimiter != ",":
            shown = {"\t": "tabs"}.get(self.delimiter, repr(self.delimiter))
            found.append(f"columns are separated by {shown}")
        return found

    def read_chunks(self, stream: Any, num_bytes: int) -> Iterator[bytes]:
        """Yield a file in chunks of UTF-8 with LF or CRLF, without its byte-order mark.

        Raises UnicodeDecodeError for bytes that are not of the encoding; UTF-8 is not checked.
        """
        decoder = None
        if self.encoding != "utf-8":
            decoder = codecs.getincrementaldecoder(self.encoding)()
        is_first = True
        while chunk := stream.read(num_bytes):
            if decoder is not None:
                chunk = decoder.decode(chunk).encode()
            if is_first:
                chunk = chunk.removeprefix(codecs.BOM_UTF8)
                is_first = False
            if self.ends_with_cr:
                chunk = chunk.replace(b"\r", b"\n")
            if chunk:
                yield chunk
        if decoder is not None:
            decoder.decode(b"", final=True)


def decode_sample(sample: bytes, encoding: str) -> str:
    """Return the text of the start of a file, whose last character may be cut."""
    text = codecs.getincrementaldecoder(encoding)("replace").decode(sample)
    return text.removeprefix("\ufeff")


def find_encoding(sample: bytes) -> str:
    """Return utf-8, or utf-16 or utf-32 by the mark of the file or its zero bytes."""
    for mark, encoding in _MARKS:
        if sample.startswith(mark):
            return encoding
    half = len(sample) // 2
    # text of mostly western letters has a zero byte in each pair
    if half and sample[1 : 2 * half : 2].count(0) > 0.4 * half:
        return "utf-16-le"
    if half and sample[0 : 2 * half : 2].count(0) > 0.4 * half:
        return "utf-16-be"
    return "utf-8"


def find_delimiter(text: str, view: View, options: ListOptions) -> str:
    """Return the delimiter by which most of the needed columns are found, and rows fit the header.

    The first line may tell it: `sep=;`.
    """
    hint = _HINT.fullmatch(text.splitlines()[0]) if text.strip() else None
    if hint is not None:
        return hint[1]

    def rate(delimiter: str) -> tuple[int, float, int]:
        rows = sample_rows(text, delimiter)
        header = [name.strip() for name in rows[0]] if rows else []
        wanted = name_columns(header, view, options)
        num_found = sum(bool(list_matches(*pair, header)) for pair in wanted.items())
        num_like = sum(len(row) == len(header) for row in rows)
        return num_found, num_like / max(len(rows), 1), len(header)

    return max(DELIMITERS, key=rate)


def sample_rows(text: str, delimiter: str) -> list[list[str]]:
    """Return the first rows of a sample of a file that are not blank; the last may be cut."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    found: list[list[str]] = []
    try:
        filled = (row for row in rows if any(field.strip() for field in row))
        found.extend(row for row in islice(filled, SAMPLE_ROWS) if not is_hint(row, delimiter))
    except csv.Error:  # the rows before it are enough; the file's reader names the line
        return found
    return found


def is_hint(fields: list[str], delimiter: str) -> bool:
    """Return whether a row only tells Excel the delimiter."""
    return _HINT.fullmatch(delimiter.join(fields)) is not None
