"""Exact search: the k largest inner products of unit vectors, in memory O(query block x reference block).

Three engines give the same answers, and each the same bits for any number of threads. Which is
fastest depends on the processor, and `choose_engine` measures it:
faiss (`faiss.knn`), torch (float32 products, and a selection of our own), torch_bf16 (products in bfloat16 give
candidates, within a proven bound of their error, that are ranked again in float32). torch is imported by the first
search: approximate indexes (FAISS alone) start without the seconds that it takes.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import numba
import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Bools, Floats32, Floats64, Ints
from s4g_ray.index.faiss_library import faiss, row_blocks, serial_pool, set_num_threads
from s4g_ray.index.top_k import Found, TopK, buffer_width

if TYPE_CHECKING:
    import torch

Engine = Literal["auto", "faiss", "torch", "torch_bf16"]
References = Floats32 | NDArray[np.float16]
QUERY_BLOCK, REFERENCE_BLOCK = (
    2048,
    2048,
)  # scores in memory: 16 MiB, read again while they are in the cache
PRODUCT_COLUMNS = 512  # references in a product that one thread of torch computes
PAIRS_ROWS = 20  # queries; faiss computes fewer pair by pair: the same for any number of threads
ALL_AT_ONCE = 2**22  # references in one call of faiss.knn, which makes blocks itself
WORTH_MEASURING = (
    2e10  # floating-point operations: below, the calibration would take longer than the search
)
CALIBRATION_S = 0.9
UNIT_TOLERANCE = 2e-3  # of a length: float16 keeps it within 5e-4
BF16_ROUNDOFF = 2.0**-8


def unit_rows(vectors: NDArray[Any]) -> Floats32:
    """vectors[N, D] -> float32 rows of length 1, a copy; rows of zeros stay. Raises ValueError for non-finite ones."""
    with np.errstate(over="ignore"):
        rows = np.array(vectors, dtype=np.float32, order="C")
    norms = np.sqrt(
        np.einsum("nd,nd->n", rows, rows, dtype=np.float64)
    )  # squares may leave float32's range
    bad = np.flatnonzero(~np.isfinite(norms))
    if len(bad):
        raise ValueError(f"{len(bad)} vectors are not finite; the first is row {bad[0]}")
    np.divide(rows, np.where(norms > 0, norms, 1)[:, None], out=rows, casting="same_kind")
    return rows


def exact_top_k(
    queries: Floats32,
    references: References,
    k: int,
    *,
    engine: Engine = "auto",
    num_threads: int | None = None,
) -> Found:
    """queries[M, D], references[R, D] of length 1 -> rows[M, k] of the references, scores[M, k], best first.

    Equal scores are ordered by row. References may be float16: their blocks are made float32 on the way. Raises
    ValueError for shapes that do not fit, k outside 1..R, and rows that are not of length 1.
    """
    for name, vectors in (("queries", queries), ("references", references)):
        _check_unit(name, vectors)
    if queries.shape[1] != references.shape[1]:
        raise ValueError(
            f"queries{list(queries.shape)} do not fit references{list(references.shape)}"
        )
    if not 1 <= k <= len(references):
        raise ValueError(f"k={k} is not within 1..{len(references)}, the number of references")
    return search(
        queries, references, np.arange(len(references)), k, engine=engine, num_threads=num_threads
    )


def search(
    queries: Floats32,
    references: References,
    ids: Ints,
    k: int,
    *,
    engine: Engine = "auto",
    num_threads: int | None = None,
) -> Found:
    """As exact_top_k, for arguments known to be in order; equal scores are ordered by ids[R]."""
    threads = set_num_threads(num_threads)
    found = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
    if engine == "auto":
        long = 2.0 * queries.size * len(references) >= WORTH_MEASURING
        engine = choose_engine(queries.shape[1], threads) if long else "torch"
    with serial_pool(threads) as pool:
        task = _Task(references, ids, k, pool, threads)
        size = int(np.clip(QUERY_BLOCK * REFERENCE_BLOCK // buffer_width(k), 1, QUERY_BLOCK))
        for start in range(0, len(queries), size):
            block = _Shared.alias(
                np.ascontiguousarray(queries[start : start + size], dtype=np.float32)
            )
            part = task.answer(block, engine)
            found[0][start : start + size], found[1][start : start + size] = part
    return found


@functools.cache
def choose_engine(dim: int, num_threads: int) -> Literal["faiss", "torch", "torch_bf16"]:
    """The fastest engine for vectors of D values, from less than a second of measurement; kept for the process."""
    return min(measure_engines(dim, num_threads).items(), key=lambda item: item[1])[0]


def measure_engines(
    dim: int, num_threads: int, budget_s: float = CALIBRATION_S
) -> dict[Literal["faiss", "torch", "torch_bf16"], float]:
    """Seconds per floating-point operation of each engine's top-128, the best of a few searches of random vectors."""
    rng = np.random.default_rng(0)
    references = unit_rows(rng.standard_normal((4 * REFERENCE_BLOCK, dim), dtype=np.float32))
    ids = np.arange(len(references))
    seconds: dict[Literal["faiss", "torch", "torch_bf16"], float] = {}
    names: tuple[Literal["torch", "faiss", "torch_bf16"], ...] = ("torch", "faiss", "torch_bf16")
    for name in names:
        search(
            references[:2], references[:256], ids, 128, engine=name, num_threads=num_threads
        )  # compiles
        rows, until = 16, time.perf_counter() + budget_s / len(names)
        while name not in seconds or time.perf_counter() < until:
            started = time.perf_counter()
            search(references[:rows], references, ids, 128, engine=name, num_threads=num_threads)
            work = 2.0 * rows * references.size
            seconds[name] = min(seconds.get(name, np.inf), (time.perf_counter() - started) / work)
            left = until - time.perf_counter()
            rows = int(np.clip(rows * left / 3 / (seconds[name] * work), 16, QUERY_BLOCK))
    return seconds


class _Task:
    """What the queries of one search share. Answers a block of queries at a time."""

    def __init__(
        self, references: References, ids: Ints, k: int, pool: ThreadPoolExecutor, threads: int
    ) -> None:
        self.references, self.ids, self.k = references, ids, k
        self._pool, self._threads = pool, threads
        self._products: dict[torch.dtype, torch.Tensor] = {}
        self._rounding: tuple[float, float] | None = None

    def answer(self, queries: Floats32, engine: Engine) -> Found:
        """rows[b, k], scores[b, k] of a block; what an engine leaves undecided is searched in float32."""
        if engine == "torch":
            return self._torch(queries)
        rows, scores, undecided = (self._faiss if engine == "faiss" else self._bf16)(queries)
        if undecided.any():
            rows[undecided], scores[undecided] = self._torch(queries[undecided])
        return rows, scores

    def _torch(self, queries: Floats32) -> Found:
        best, unit = self._best(len(queries), self.k), _tensor(queries)
        for first, block in self._blocks():
            best.fold(
                self._product(unit, block.float()), np.arange(first, first + len(block))[None]
            )
        return best.sorted()

    def _faiss(self, queries: Floats32) -> tuple[Ints, Floats32, Bools]:
        """Undecided: more than k references score as the k-th does, and faiss keeps any of them."""
        best, undecided = self._best(len(queries), self.k), np.zeros(len(queries), bool)
        size = ALL_AT_ONCE if self.references.dtype == np.float32 else REFERENCE_BLOCK
        for first, block in self._blocks(size):
            scores, rows = self._knn(queries, block.float().numpy(), min(self.k + 1, len(block)))
            if scores.shape[1] > self.k:
                undecided |= scores[:, self.k - 1] == scores[:, self.k]
            best.fold(scores, rows + first)
        return *best.sorted(), undecided

    def _bf16(self, queries: Floats32) -> tuple[Ints, Floats32, Bools]:
        """Undecided: references that were not kept may be among the k best.

        With q' and r' the rounded vectors, |q.r - q'.r'| <= |q - q'||r| + |q'||r - r'| (Cauchy-Schwarz); adding D
        products in float32 errs by at most 2 D 2^-24 |q'||r'|; together `error`. The result is rounded by a share
        u = 2^-8 at most. So the k-th best score is at least t - u|t| - error, t the k-th largest rounded product, and
        whatever reaches that has a product x with x + u|x| + error no less than it.
        """
        kept = min(2 * self.k + 128, len(self.references))
        best, unit = self._best(len(queries), kept), _tensor(queries)
        half = unit.bfloat16()
        for first, block in self._blocks():
            best.fold(
                self._product(half, block.bfloat16()), np.arange(first, first + len(block))[None]
            )
        rows, products = best.sorted()
        lost, length = _rounding(unit)
        lost_references, longest = self._references_rounding()
        error = lost * longest + (length + lost) * lost_references
        error += 2 * queries.shape[1] * 2.0**-24 * (length + lost) * (longest + lost_references)
        u = BF16_ROUNDOFF / (1 - BF16_ROUNDOFF)
        t = products[:, self.k - 1].astype(np.float64)
        least = t - u * np.abs(t) - 2 * error
        least = least / np.where(least > 0, 1 + u, 1 - u)
        undecided = (products[:, -1] >= least) & (kept < len(self.references))
        return *self._rank_again(queries, rows, (products >= least[:, None]).sum(axis=1)), undecided

    def _rank_again(self, queries: Floats32, rows: Ints, counts: Ints) -> Found:
        """The k best of the first counts[b] of rows[b, c], by float32 scores."""
        best = self._best(len(queries), self.k)

        def rank(part: slice) -> None:
            for i in range(part.start, part.stop):
                candidates = rows[i : i + 1, : counts[i]]
                vectors = self.references[candidates[0]].astype(np.float32, copy=False)
                best.fold_part(slice(i, i + 1), _dots(queries[i], vectors)[None], candidates)

        self._parallel(rank, len(queries))
        return best.sorted()

    def _best(self, count: int, k: int) -> TopK:
        return TopK(count, k, self.ids, self._parallel)

    def _blocks(self, size: int = REFERENCE_BLOCK) -> Iterator[tuple[int, torch.Tensor]]:
        """The references in blocks, as they are stored, with the row of the first."""
        for first in range(0, len(self.references), size):
            yield first, _tensor(self.references[first : first + size])

    def _product(self, queries: torch.Tensor, block: torch.Tensor) -> Floats32:
        """[b, c], in memory that the next product overwrites."""
        import torch

        count = len(queries) * len(block)
        if self._products.get(queries.dtype, torch.empty(0)).numel() < count:
            self._products[queries.dtype] = torch.empty(count, dtype=queries.dtype)
        out = self._products[queries.dtype][:count].view(len(queries), len(block))

        def multiply(tile: tuple[slice, slice]) -> None:
            torch.mm(queries[tile[0]], block[tile[1]].T, out=out[tile])

        # a search took 0.16 to 0.18 s of processor time, with whole products 0.15 to 0.16
        # (1024 queries, 8192 references, D=512)
        tiles = itertools.product(row_blocks(len(queries)), _slices(len(block), PRODUCT_COLUMNS))
        list(self._pool.map(multiply, tiles))
        return out.float().numpy() if out.dtype == torch.bfloat16 else out.numpy()

    def _knn(self, queries: Floats32, block: Floats32, k: int) -> tuple[Floats32, Ints]:
        """scores[b, k], rows[b, k] of the block, by parts whose bounds depend on the queries alone.

        A QUERY_BLOCK has eight parts: more threads do not help.
        """

        def search_part(part: slice) -> tuple[Floats32, Ints]:
            scores, rows = faiss.knn(queries[part], block, k, metric=faiss.METRIC_INNER_PRODUCT)
            return scores, rows

        if len(queries) < PAIRS_ROWS:
            return search_part(slice(None))
        found = list(self._pool.map(search_part, row_blocks(len(queries))))
        scores, rows = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return scores, rows

    def _references_rounding(self) -> tuple[float, float]:
        """The most that a reference loses by rounding, and the greatest length."""
        if self._rounding is None:
            pairs = [_rounding(block.float()) for _, block in self._blocks()]
            self._rounding = (
                max(float(a.max()) for a, _ in pairs),
                max(float(b.max()) for _, b in pairs),
            )
        return self._rounding

    def _parallel(self, work: Callable[[slice], None], count: int) -> None:
        """Threads of our own: numba's may not be entered by two threads at a time (workqueue layer)."""
        edges = np.linspace(0, count, min(self._threads, count) + 1).astype(int).tolist()
        parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
        if len(parts) == 1:
            work(parts[0])
        else:
            list(self._pool.map(work, parts))


def _slices(count: int, size: int) -> list[slice]:
    """Consecutive slices of `size` rows that cover `count`."""
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


class _Shared:
    """The memory of an array, as if it could be written to: torch warns of what is read-only, and only reads."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array  # kept alive
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}

    @classmethod
    def alias(cls, array: NDArray[Any]) -> NDArray[Any]:
        """The array itself, or one that shares its memory."""
        return array if array.flags.writeable else np.asarray(cls(array))


def _tensor(rows: References) -> torch.Tensor:
    """The rows as a tensor, in the same memory."""
    import torch

    return torch.from_numpy(_Shared.alias(rows))


def _rounding(rows: torch.Tensor) -> tuple[Floats64, Floats64]:
    """Of each row: the length of what bfloat16 loses, and the row's length (float32 sums: 1e-4 is added)."""
    import torch

    lost = torch.linalg.vector_norm(rows - rows.bfloat16().float(), dim=1)
    length = torch.linalg.vector_norm(rows, dim=1)
    return lost.numpy().astype(np.float64) * 1.0001, length.numpy().astype(np.float64) * 1.0001


def _check_unit(name: str, vectors: References) -> None:
    if vectors.ndim != 2:
        raise ValueError(f"{name}{list(vectors.shape)} are not [N, D]")
    for start in range(0, len(vectors), REFERENCE_BLOCK):
        rows = vectors[start : start + REFERENCE_BLOCK].astype(np.float32, copy=False)
        squares = np.einsum("nd,nd->n", rows, rows)
        bad = np.flatnonzero(~(np.abs(squares - 1) <= 2 * UNIT_TOLERANCE))
        if len(bad):
            raise ValueError(
                f"row {start + bad[0]} of {name} is not of length 1; normalise with unit_rows"
            )


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _dots(query: Floats32, vectors: Floats32) -> Floats32:  # pragma: no cover (compiled)
    """query[D], vectors[c, D] -> inner products[c]."""
    products = np.empty(len(vectors), np.float32)
    for i in range(len(vectors)):
        total, row = np.float32(0), vectors[i]
        for d in range(len(query)):
            total += query[d] * row[d]
        products[i] = total
    return products
