"""Define TextColumn: many strings in few arrays, which a file holds and processes share.

A Python list of paths costs 100 bytes a string beyond its text, in each process.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Ints, Rows32

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class TextColumn(Sequence[str]):
    """N strings. Each is the prefix that all share, and a text: a range of the heap.

    Text t is heap[bounds[t] : bounds[t + 1]]. String i has text codes[i]; or text i, without codes.
    """

    prefix: str
    heap: Bytes  # UTF-8
    bounds: Ints | Rows32  # [T + 1], ascending
    codes: Rows32 | None = None

    @classmethod
    def from_texts(cls, texts: Sequence[str]) -> TextColumn:
        """Copy strings into a column, without codes."""
        encoded = [text.encode() for text in texts]
        bounds = np.cumsum([0, *map(len, encoded)])
        return cls("", np.frombuffer(b"".join(encoded), dtype=np.uint8), shrink(bounds))

    def __len__(self) -> int:
        return len(self.bounds) - 1 if self.codes is None else len(self.codes)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return a string, or a list of strings. Raises IndexError."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = operator.index(index)
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} strings")
        row %= len(self)
        text = row if self.codes is None else int(self.codes[row])
        data = self.heap[int(self.bounds[text]) : int(self.bounds[text + 1])]
        return self.prefix + data.tobytes().decode()

    def take(self, rows: Ints | slice) -> TextColumn:
        """Return the strings of some rows, in their order.

        For a slice (of step 1), the column holds the texts of these rows alone; otherwise it shares
        the heap of this one, so that it costs 4 bytes a row.
        """
        if not isinstance(rows, slice):
            codes = rows if self.codes is None else self.codes[rows]
            return TextColumn(self.prefix, self.heap, self.bounds, codes.astype(np.int32))
        if self.codes is not None:
            used, codes = np.unique(self.codes[rows], return_inverse=True)
            texts = TextColumn("", self.heap, self.bounds, used)
            column = TextColumn.from_texts(texts)
            return TextColumn(self.prefix, column.heap, column.bounds, codes.astype(np.int32))
        first, stop, _ = rows.indices(len(self))
        bounds = self.bounds[first : max(first, stop) + 1]
        return TextColumn(self.prefix, self.heap[bounds[0] : bounds[-1]], bounds - bounds[0])


def shrink(values: Ints) -> Ints | Rows32:
    """Return the values as int32 where they fit, so that they take half of the memory."""
    limits = np.iinfo(np.int32)
    if len(values) and (values.min() < limits.min or values.max() > limits.max):
        return values
    return values.astype(np.int32)
