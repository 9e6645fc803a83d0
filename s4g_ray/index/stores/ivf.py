"""Hold codes of vectors in k-means lists, of which a query visits some (FAISS's IVF indexes)."""

from __future__ import annotations

from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Bools, Floats32, Ints, Rows32
from s4g_ray.index.faiss_library import faiss, set_faiss_threads
from s4g_ray.index.stores.gpu import GpuCopy, GpuDevice, GpuPart
from s4g_ray.index.stores.ivf_training import assign, nearest_lists, rotate, without_rotation
from s4g_ray.index.stores.store import Scope, mark_missing, selector_of
from s4g_ray.index.top_k import Found

# codes that a search among few rows compares with, beside those that a query visits anyway, before
# it visits lists instead: the nearest of few rows lie in more lists
SMALL = 4
# ids that queries may pass over in a list before its codes are worth copying: 10 us against 1 ns
COPY_WORTH = 10_000
PRODUCTS = 2**22  # of queries and lists at once
ID_MOD = 1  # faiss: a subset of the ids that leave a remainder


class IvfStore:
    """Codes of rows in lists; a list keeps them in the order of their rows."""

    def __init__(self, index: Any, nprobe: int) -> None:
        self._nprobe = nprobe
        self._index = index
        self._lists = without_rotation(index)
        self._list_of_row: Rows32 | None = None
        self._gpu: GpuDevice | None = None  # that finds the lists of vectors which are added
        self._gpu_quantizer: Any = None
        self._copy: GpuCopy | None = None

    @classmethod
    def from_bytes(cls, data: Any, nprobe: int) -> Self:
        """Read an index that `train_lists` or `write` serialised."""
        return cls(faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8)), nprobe)

    def __len__(self) -> int:
        return int(self._lists.ntotal)

    @property
    def effort(self) -> int | None:
        """Lists that a query visits: as many as were set, but on a GPU within its limit."""
        return min(self._nprobe, self.max_effort)

    @effort.setter
    def effort(self, effort: int | None) -> None:
        assert effort is not None
        self._nprobe = effort

    @property
    def max_effort(self) -> int:
        """All lists; on a GPU as many as its kernels visit."""
        num_lists = int(self._lists.nlist)
        return num_lists if self._copy is None else min(num_lists, self._copy.gpu.max_nprobe)

    def add_on(self, gpu: GpuDevice) -> None:
        """Find the lists of vectors that are added on a GPU."""
        self._gpu = gpu

    def add(self, vectors: Floats32) -> None:
        """Append vectors[n, D]; without a GPU the same bits for any number of threads.

        FAISS (1.15.1) itself fills lists that way; products are computed by blocks here.
        """
        if self._gpu is not None and self._gpu_quantizer is None:
            self._gpu_quantizer = self._gpu.upload(self._lists.quantizer)
        turned = rotate(self._index, vectors)
        nearest = assign(self._lists.quantizer, turned, self._gpu, self._gpu_quantizer)
        self._lists.add_core(len(turned), faiss.swig_ptr(turned), None, faiss.swig_ptr(nearest))
        self._changed()

    def keep(self, rows: Bools) -> bool:
        """Drop the rows that are False; the others keep their order, and each list's codes too.

        The store is then the same, bit by bit, as one to which only the others were added.
        """
        numbers = np.cumsum(rows) - 1
        for number in range(self._lists.nlist):
            ids, codes = self._list(number)
            kept = rows[ids]
            count = int(kept.sum())
            if count < len(ids):
                codes[:count] = codes[kept]
            ids[:count] = numbers[ids[kept]]
            if count < len(ids):
                self._lists.invlists.resize(number, count)
        self._lists.ntotal = int(rows.sum())
        self._changed()
        return True

    def search(self, queries: Floats32, k: int, effort: int | None, scope: Scope) -> Found:
        """Search as Store.search does; effort: the lists that a query visits.

        Compares few rows one by one, whatever their lists.
        """
        set_faiss_threads(scope.num_threads)
        effort = min(effort or 1, self.max_effort)
        if scope.rows is not None:
            visited = effort * len(self) / self._lists.nlist
            if len(scope.rows) <= SMALL * visited:
                return self.search_all(queries, k, scope)
            return self._visit(queries, k, effort, selector_of(faiss, scope.rows, len(self)))
        if self._copy is None:
            return self._visit(queries, k, effort)
        parameters = faiss.SearchParametersIVF(nprobe=effort)
        rows, scores, doubtful = self._copy.search(queries, k, parameters)
        if doubtful.any():
            rows[doubtful], scores[doubtful] = self._visit(queries[doubtful], k, effort)
        return rows, scores

    def search_all(self, queries: Floats32, k: int, scope: Scope) -> Found:
        """Compare queries with the codes of all rows of the scope.

        For many queries the codes are copied together; few pass over the others in their lists.
        """
        set_faiss_threads(scope.num_threads)
        num_lists = int(self._lists.nlist)
        if scope.rows is None:
            return self._visit(queries, k, num_lists)
        numbers = self._lists_of(scope.rows)
        chosen = np.unique(numbers).astype(np.int64)
        if len(queries) * len(self) <= COPY_WORTH * num_lists:
            lists = self._lists
            selector = selector_of(faiss, scope.rows, len(self))
        else:
            lists = self._copy_rows(scope.rows, numbers)
            selector = None
        quantizer = faiss.downcast_index(self._lists.quantizer)
        every = faiss.rev_swig_ptr(quantizer.get_xb(), num_lists * self._lists.d)
        centroids = faiss.IndexFlatIP(self._lists.d)
        centroids.add(every.reshape(num_lists, -1)[chosen])
        turned = rotate(self._index, queries)
        found = []
        size = max(PRODUCTS // len(chosen), 1)
        for start in range(0, len(turned), size):
            block = turned[start : start + size]
            places, products = nearest_lists(centroids, block, len(chosen))
            found.append(self._visit_lists(lists, block, k, chosen[places], products, selector))
        return _concatenate(found, k)

    def write(self, file: BinaryIO) -> None:
        """Append the index to a file, as faiss serialises it."""
        faiss.write_index(self._index, faiss.PyCallbackIOWriter(file.write))

    def to_gpu(self, gpu: GpuDevice) -> None:
        """Let a copy of the lists on a GPU answer, and add there; ivf_sq8 alone."""
        self.add_on(gpu)

        def make_parts(count: int) -> list[GpuPart]:
            return [GpuPart(gpu.upload(self._part(count, first))) for first in range(count)]

        self._copy = GpuCopy(gpu, make_parts)

    def _part(self, count: int, first: int) -> Any:
        """Return the index of every count-th row, beginning with `first`; all for count = 1."""
        if count == 1:
            return self._lists
        part = self._empty_copy()
        self._lists.copy_subset_to(part, ID_MOD, count, first)
        return part

    def _changed(self) -> None:
        self._index.ntotal = self._lists.ntotal
        self._list_of_row = None
        if self._copy is not None:
            self._copy.discard()

    def _list(self, number: int) -> tuple[Ints, NDArray[np.uint8]]:
        """Return ids[n] and codes[n, bytes] of a list, in its own memory."""
        lists = self._lists.invlists
        size = int(lists.list_size(number))
        width = int(lists.code_size)
        if not size:
            return np.empty(0, np.int64), np.empty((0, width), np.uint8)
        ids = faiss.rev_swig_ptr(lists.get_ids(number), size)
        codes = faiss.rev_swig_ptr(lists.get_codes(number), size * width)
        return ids, codes.reshape(size, width)

    def _lists_of(self, rows: Ints) -> Rows32:
        """Return the list of each row; 4 bytes a vector are kept for it from the first call on."""
        if self._list_of_row is None:
            found = np.empty(len(self), np.int32)
            for number in range(self._lists.nlist):
                found[self._list(number)[0]] = number
            self._list_of_row = found
        return self._list_of_row[rows]

    def _copy_rows(self, rows: Ints, numbers: Rows32) -> Any:
        """Copy the codes of rows[n], ascending, that lie in lists numbers[n] into an index."""
        subset = self._empty_copy()
        order = np.argsort(numbers, kind="stable")
        chosen, starts = np.unique(numbers[order], return_index=True)
        shares = np.split(rows[order], starts[1:])
        for number, own in zip(chosen.tolist(), shares, strict=True):
            ids, codes = self._list(number)
            picked = np.ascontiguousarray(codes[np.searchsorted(ids, own)])
            subset.invlists.add_entries(
                number, len(own), faiss.swig_ptr(own), faiss.swig_ptr(picked)
            )
        return subset

    def _empty_copy(self) -> Any:
        """Return an index without codes that shares this one's centroids."""
        lists = self._lists
        if isinstance(lists, faiss.IndexIVFScalarQuantizer):
            copy = faiss.IndexIVFScalarQuantizer(
                lists.quantizer,
                lists.d,
                lists.nlist,
                lists.sq.qtype,
                lists.metric_type,
                lists.by_residual,
            )
            copy.sq = lists.sq
        else:
            bits = lists.rabitq.nb_bits
            copy = faiss.IndexIVFRaBitQ(
                lists.quantizer, lists.d, lists.nlist, lists.metric_type, True, bits
            )
            copy.rabitq = lists.rabitq
            copy.qb = lists.qb
        copy.is_trained = True
        return copy

    def _visit(self, queries: Floats32, k: int, effort: int, selector: Any = None) -> Found:
        """Search the nearest `effort` lists of each query, for the rows that are selected."""
        turned = rotate(self._index, queries)
        num_lists = min(effort, int(self._lists.nlist))
        found = []
        size = max(PRODUCTS // num_lists, 1)
        for start in range(0, len(turned), size):
            block = turned[start : start + size]
            nearest, products = nearest_lists(self._lists.quantizer, block, num_lists)
            found.append(self._visit_lists(self._lists, block, k, nearest, products, selector))
        return _concatenate(found, k)

    def _visit_lists(
        self,
        lists: Any,
        turned: Floats32,
        k: int,
        nearest: Ints,
        products: Floats32,
        selector: Any = None,
    ) -> Found:
        """Search the lists nearest[n, nprobe] of queries turned[n, D] -> rows[n, k], scores."""
        rows = np.empty((len(turned), k), np.int64)
        scores = np.empty((len(turned), k), np.float32)
        turned = np.ascontiguousarray(turned)
        nearest = np.ascontiguousarray(nearest)
        products = np.ascontiguousarray(products)
        lists.search_preassigned_c(  # the C form: the Python wrapper takes no parameters
            len(turned),
            faiss.swig_ptr(turned),
            k,
            faiss.swig_ptr(nearest),
            faiss.swig_ptr(products),
            faiss.swig_ptr(scores),
            faiss.swig_ptr(rows),
            False,
            self._parameters(nearest.shape[1], selector),
        )
        return mark_missing(rows, scores)

    def _parameters(self, nprobe: int, selector: Any) -> Any:
        if isinstance(self._lists, faiss.IndexIVFRaBitQ):
            parameters = faiss.IVFRaBitQSearchParameters()
            parameters.qb = self._lists.qb
        else:
            parameters = faiss.SearchParametersIVF()
        parameters.nprobe = nprobe
        if selector is not None:
            parameters.sel = selector
        return parameters


def _concatenate(found: list[Found], k: int) -> Found:
    if not found:
        return np.empty((0, k), np.int64), np.empty((0, k), np.float32)
    if len(found) == 1:
        return found[0]
    rows, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return rows, scores
