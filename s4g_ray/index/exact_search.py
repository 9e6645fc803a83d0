"""Find the k largest inner products of unit vectors, exactly.

Needs memory O(query block x reference block). Three engines give the same answers, and each the
same bits for any number of threads; which is fastest depends on the processor, and `choose_engine`
measures it:

    faiss       faiss.knn
    torch       float32 products, and the selection of top_k.py
    torch_bf16  products in bfloat16 give candidates, within a proven bound of their error, that
                are ranked again in float32

The first search imports torch: approximate indexes (FAISS alone) start without the seconds that
this takes.
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
MeasuredEngine = Literal["faiss", "torch", "torch_bf16"]
References = Floats32 | NDArray[np.float16]
# scores of a block in memory: 16 MiB, read again while they are in the cache
QUERY_BLOCK = 2048
REFERENCE_BLOCK = 2048
PRODUCT_COLUMNS = 512  # references in a product that one thread of torch computes
# below so many queries faiss computes pair by pair: the same bits for any number of threads
PAIRS_ROWS = 20
ALL_AT_ONCE = 2**22  # references in one call of faiss.knn, which makes blocks itself
# floating-point operations; for fewer, the calibration would take longer than the search
WORTH_MEASURING = 2e10
CALIBRATION_S = 0.9
UNIT_TOLERANCE = 2e-3  # allowed error of a length: float16 keeps it within 5e-4
BF16_ROUNDOFF = 2.0**-8


def unit_rows(vectors: NDArray[Any]) -> Floats32:
    """Scale vectors[N, D] to length 1, in a float32 copy; rows of zeros stay zeros.

    Raises ValueError for vectors that are not finite.
    """
    with np.errstate(over="ignore"):
        rows = np.array(vectors, dtype=np.float32, order="C")
    squares = np.einsum("nd,nd->n", rows, rows, dtype=np.float64)  # may leave float32's range
    norms = np.sqrt(squares)
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
    """Search queries[M, D], references[R, D] -> rows[M, k], scores[M, k], best first.

    All vectors have length 1. Equal scores are ordered by row. References may be float16: blocks
    of them are converted to float32. Raises ValueError for shapes that do not fit, k outside 1..R,
    and rows that are not of length 1.
    """
    _check_unit("queries", queries)
    _check_unit("references", references)
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
    """Search as exact_top_k does, without its checks; equal scores are ordered by ids[R]."""
    threads = set_num_threads(num_threads)
    rows = np.empty((len(queries), k), np.int64)
    scores = np.empty((len(queries), k), np.float32)
    if engine == "auto":
        operations = 2.0 * queries.size * len(references)
        is_long = operations >= WORTH_MEASURING
        engine = choose_engine(queries.shape[1], threads) if is_long else "torch"
    with serial_pool(threads) as pool:
        task = _SearchTask(references, ids, k, pool, threads)
        size = int(np.clip(QUERY_BLOCK * REFERENCE_BLOCK // buffer_width(k), 1, QUERY_BLOCK))
        for start in range(0, len(queries), size):
            part = slice(start, start + size)
            block = np.ascontiguousarray(queries[part], dtype=np.float32)
            rows[part], scores[part] = task.answer(_SharedMemory.alias(block), engine)
    return rows, scores


@functools.cache
def choose_engine(dim: int, num_threads: int) -> MeasuredEngine:
    """Return the fastest engine for vectors of `dim` values, measured in less than a second.

    The process keeps the result.
    """
    return min(measure_engines(dim, num_threads).items(), key=lambda item: item[1])[0]


def measure_engines(
    dim: int, num_threads: int, budget_s: float = CALIBRATION_S
) -> dict[MeasuredEngine, float]:
    """Measure the seconds per floating-point operation of each engine's top-128.

    Searches random vectors a few times and takes the shortest time.
    """
    rng = np.random.default_rng(0)
    references = unit_rows(rng.standard_normal((4 * REFERENCE_BLOCK, dim), dtype=np.float32))
    ids = np.arange(len(references))
    engines: tuple[MeasuredEngine, ...] = ("torch", "faiss", "torch_bf16")
    seconds: dict[MeasuredEngine, float] = {}
    for engine in engines:
        # compiles
        search(references[:2], references[:256], ids, 128, engine=engine, num_threads=num_threads)
        num_queries = 16
        until = time.perf_counter() + budget_s / len(engines)
        while engine not in seconds or time.perf_counter() < until:
            queries = references[:num_queries]
            started = time.perf_counter()
            search(queries, references, ids, 128, engine=engine, num_threads=num_threads)
            elapsed_s = time.perf_counter() - started
            work = 2.0 * num_queries * references.size
            seconds[engine] = min(seconds.get(engine, np.inf), elapsed_s / work)
            left_s = until - time.perf_counter()
            affordable = num_queries * left_s / 3 / (seconds[engine] * work)
            num_queries = int(np.clip(affordable, 16, QUERY_BLOCK))
    return seconds


class _SearchTask:
    """One search: answers a block of queries at a time."""

    def __init__(
        self, references: References, ids: Ints, k: int, pool: ThreadPoolExecutor, num_threads: int
    ) -> None:
        self.references = references
        self.ids = ids
        self.k = k
        self._pool = pool
        self._num_threads = num_threads
        self._products: dict[torch.dtype, torch.Tensor] = {}
        self._rounding: tuple[float, float] | None = None

    def answer(self, queries: Floats32, engine: Engine) -> Found:
        """Search a block of queries -> rows[b, k], scores[b, k].

        Queries that an engine leaves undecided are searched by torch in float32.
        """
        if engine == "torch":
            return self._search_torch(queries)
        if engine == "faiss":
            rows, scores, undecided = self._search_faiss(queries)
        else:
            rows, scores, undecided = self._search_bf16(queries)
        if undecided.any():
            rows[undecided], scores[undecided] = self._search_torch(queries[undecided])
        return rows, scores

    def _search_torch(self, queries: Floats32) -> Found:
        best = self._make_top_k(len(queries), self.k)
        unit = _as_tensor(queries)
        for first, block in self._blocks():
            rows = np.arange(first, first + len(block))
            best.fold(self._multiply(unit, block.float()), rows[None])
        return best.sorted()

    def _search_faiss(self, queries: Floats32) -> tuple[Ints, Floats32, Bools]:
        """Return rows[b, k], scores[b, k], undecided[b].

        Undecided: more than k references score as the k-th does, and faiss keeps any of them.
        """
        best = self._make_top_k(len(queries), self.k)
        undecided = np.zeros(len(queries), bool)
        size = ALL_AT_ONCE if self.references.dtype == np.float32 else REFERENCE_BLOCK
        for first, block in self._blocks(size):
            scores, rows = self._knn(queries, block.float().numpy(), min(self.k + 1, len(block)))
            if scores.shape[1] > self.k:
                undecided |= scores[:, self.k - 1] == scores[:, self.k]
            best.fold(scores, rows + first)
        return *best.sorted(), undecided

    def _search_bf16(self, queries: Floats32) -> tuple[Ints, Floats32, Bools]:
        """Return rows[b, k], scores[b, k], undecided[b].

        Undecided: references that were not kept may be among the k best.

        With q' and r' the rounded vectors, |q.r - q'.r'| <= |q - q'||r| + |q'||r - r'|
        (Cauchy-Schwarz); adding D products in float32 errs by at most 2 D 2^-24 |q'||r'|; together
        `error`. The result is rounded by a share u = 2^-8 at most. So the k-th best score is at
        least t - u|t| - error, t the k-th largest rounded product, and each reference that reaches
        this has a product x with x + u|x| + error no less than it.
        """
        num_kept = min(2 * self.k + 128, len(self.references))
        best = self._make_top_k(len(queries), num_kept)
        unit = _as_tensor(queries)
        half = unit.bfloat16()
        for first, block in self._blocks():
            block_rows = np.arange(first, first + len(block))
            best.fold(self._multiply(half, block.bfloat16()), block_rows[None])
        rows, products = best.sorted()
        lost, length = _measure_rounding(unit)
        lost_references, longest = self._references_rounding()
        error = lost * longest + (length + lost) * lost_references
        error += 2 * queries.shape[1] * 2.0**-24 * (length + lost) * (longest + lost_references)
        u = BF16_ROUNDOFF / (1 - BF16_ROUNDOFF)
        t = products[:, self.k - 1].astype(np.float64)
        least = t - u * np.abs(t) - 2 * error
        least = least / np.where(least > 0, 1 + u, 1 - u)
        undecided = (products[:, -1] >= least) & (num_kept < len(self.references))
        counts = (products >= least[:, None]).sum(axis=1)
        return *self._rank_again(queries, rows, counts), undecided

    def _rank_again(self, queries: Floats32, rows: Ints, counts: Ints) -> Found:
        """Select the k best of the first counts[b] of rows[b, c], by float32 scores."""
        best = self._make_top_k(len(queries), self.k)

        def rank(part: slice) -> None:
            for i in range(part.start, part.stop):
                candidates = rows[i : i + 1, : counts[i]]
                vectors = self.references[candidates[0]].astype(np.float32, copy=False)
                best.fold_part(slice(i, i + 1), _dots(queries[i], vectors)[None], candidates)

        self._run_parallel(rank, len(queries))
        return best.sorted()

    def _make_top_k(self, num_queries: int, k: int) -> TopK:
        return TopK(num_queries, k, self.ids, self._run_parallel)

    def _blocks(self, size: int = REFERENCE_BLOCK) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the references in blocks, each with its first row; their type is kept."""
        for first in range(0, len(self.references), size):
            yield first, _as_tensor(self.references[first : first + size])

    def _multiply(self, queries: torch.Tensor, block: torch.Tensor) -> Floats32:
        """Return the products[b, c], in memory that the next call overwrites."""
        import torch

        count = len(queries) * len(block)
        if self._products.get(queries.dtype, torch.empty(0)).numel() < count:
            self._products[queries.dtype] = torch.empty(count, dtype=queries.dtype)
        out = self._products[queries.dtype][:count].view(len(queries), len(block))

        def multiply_tile(tile: tuple[slice, slice]) -> None:
            torch.mm(queries[tile[0]], block[tile[1]].T, out=out[tile])

        # a search took 0.16 to 0.18 s of processor time, with whole products 0.15 to 0.16
        # (1024 queries, 8192 references, D=512)
        columns = _cut_slices(len(block), PRODUCT_COLUMNS)
        tiles = itertools.product(row_blocks(len(queries)), columns)
        list(self._pool.map(multiply_tile, tiles))
        return out.float().numpy() if out.dtype == torch.bfloat16 else out.numpy()

    def _knn(self, queries: Floats32, block: Floats32, k: int) -> tuple[Floats32, Ints]:
        """Search the block by faiss -> scores[b, k], rows[b, k].

        Divides the queries into parts whose bounds depend on the number of queries alone. A
        QUERY_BLOCK has eight parts: more threads do not help.
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
        """Return the greatest rounding loss of a reference, and the greatest length of one."""
        if self._rounding is None:
            pairs = [_measure_rounding(block.float()) for _, block in self._blocks()]
            most_lost = max(float(lost.max()) for lost, _ in pairs)
            longest = max(float(length.max()) for _, length in pairs)
            self._rounding = (most_lost, longest)
        return self._rounding

    def _run_parallel(self, work: Callable[[slice], None], count: int) -> None:
        """Run work on slices of `count` in our own threads.

        Two threads must not enter numba's threads at a time (workqueue layer).
        """
        edges = np.linspace(0, count, min(self._num_threads, count) + 1).astype(int).tolist()
        parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
        if len(parts) == 1:
            work(parts[0])
        else:
            list(self._pool.map(work, parts))


def _cut_slices(count: int, size: int) -> list[slice]:
    """Cut `count` rows into consecutive slices of `size` rows."""
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


class _SharedMemory:
    """Presents the memory of an array as writable: torch warns of read-only arrays.

    Searches only read it.
    """

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array  # keeps it alive
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}

    @classmethod
    def alias(cls, array: NDArray[Any]) -> NDArray[Any]:
        """Return the array itself, or a writable one that shares its memory."""
        return array if array.flags.writeable else np.asarray(cls(array))


def _as_tensor(rows: References) -> torch.Tensor:
    """Return the rows as a tensor, in the same memory."""
    import torch

    return torch.from_numpy(_SharedMemory.alias(rows))


def _measure_rounding(rows: torch.Tensor) -> tuple[Floats64, Floats64]:
    """Return for each row the length that bfloat16 loses, and the row's length.

    Adds a share of 1e-4 to both, because sums are in float32.
    """
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
    """Compute the inner products[c] of query[D] with vectors[c, D]."""
    products = np.empty(len(vectors), np.float32)
    for i in range(len(vectors)):
        total = np.float32(0)
        row = vectors[i]
        for d in range(len(query)):
            total += query[d] * row[d]
        products[i] = total
    return products
