"""Choose the kind and the sizes of an index from the number of vectors, D and a memory budget.

Pure arithmetic: does not import FAISS.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["auto", "flat", "sqfp16", "ivf_sq8", "ivf_rabitq", "hnsw"]
EXACT_KINDS = ("flat", "sqfp16")
IVF_KINDS = ("ivf_sq8", "ivf_rabitq")
GPU_KINDS = ("flat", "sqfp16", "ivf_sq8")  # kinds that faiss can search on a GPU
GPU_MAX_K = 2048  # limits of faiss's GPU kernels
GPU_MAX_NPROBE = 2048
# kind -> (kind, bits a value) of its variants; the most exact kind and variant come first
CHOICES: dict[str, tuple[tuple[str, int], ...]] = {
    "flat": (("flat", 32),),
    "sqfp16": (("sqfp16", 16),),
    "ivf_sq8": (("ivf_sq8", 8),),
    "ivf_rabitq": (("ivf_rabitq", 4), ("ivf_rabitq", 1)),
    "hnsw": (("hnsw", 32),),
}
# values that a query may be compared with (N x D) for auto to search exactly: 1e8 vectors of 1024.
# A query then takes 2e11 floating-point operations, as many as embedding it took (convnext_base,
# 384 px: 9e10 for each of its two views)
EXACT_VALUES = 1e11
ID_BYTES = 8
LINKS = 32  # of an HNSW vector on each level; twice as many on the lowest
EF_SEARCH = 256
# at least, to train on: faiss accepts fewer, but k-means is no longer meaningful
VECTORS_PER_LIST = 39
TRAIN_PER_LIST = 64
# lists that a query visits at first; an error about mining.min_recall names the key to raise
NPROBE = 64
# lists and graphs grow by doubling: up to twice their size, 1.5 times on average
GROWTH = 1.5


@dataclass(frozen=True)
class IndexPlan:
    """Kind and sizes of an index. JSON by `dataclasses.asdict`; sizes that do not apply are 0."""

    kind: str
    num_vectors: int  # over all shards
    dim: int
    num_lists: int = 0  # IVF: k-means cells
    nprobe: int = 0  # IVF: cells that a query visits
    bits: int = 0  # RaBitQ: bits a dimension
    links: int = 0  # HNSW
    ef_search: int = 0  # HNSW: length of a query's candidate list
    train_size: int = 0  # vectors that the template is trained on; 0: none
    memory_gb: float = 0.0  # of vectors, ids and structures, over all shards

    @property
    def is_exact(self) -> bool:
        """Return whether a search compares a query with every vector."""
        return self.kind in EXACT_KINDS

    @property
    def shared_gb(self) -> float:
        """The part of memory_gb that each shard has a copy of: centroids and RaBitQ's rotation.

        memory_gb counts it once.
        """
        rotation = 4 * self.dim**2 if self.kind == "ivf_rabitq" else 0
        return (self.num_lists * (4 * self.dim + 64) + rotation) / 1e9

    def shard_gb(self, num_shards: int) -> float:
        """Return the memory of one of num_shards shards."""
        return self.shared_gb + (self.memory_gb - self.shared_gb) / num_shards


def plan_index(
    num_vectors: int,
    dim: int,
    *,
    kind: Kind = "auto",
    memory_gb: float | None = None,
    nprobe: int | None = None,
    ef_search: int | None = None,
    gpu: bool = False,
) -> IndexPlan:
    """Choose the sizes of an index; `auto` takes the most exact kind that fits memory_gb.

    memory_gb None: no limit. gpu: only kinds that a GPU can search. auto tries, in this order:
    flat (float32), sqfp16 (float16), ivf_sq8 (8 bits a value, in k-means cells), ivf_rabitq with 4
    bits, ivf_rabitq with 1 bit. It skips flat and sqfp16 above EXACT_VALUES = N x D, where a query
    takes longer to search than to embed, and hnsw, which needs more memory than flat. ivf_rabitq
    asked for by name takes 4 bits where they fit, else 1. There are about 2 sqrt(N) cells; a
    higher nprobe visits all of them.

    Raises ValueError when nothing fits, with the arithmetic, and for a plan that a GPU cannot
    search.
    """
    if num_vectors < 1 or dim < 1:
        raise ValueError(f"an index of {num_vectors} vectors of D={dim}: both must be at least 1")
    plans = [
        _plan_variant(name, bits, num_vectors, dim, nprobe, ef_search)
        for kind_name in _candidate_kinds(kind, num_vectors * dim, gpu)
        for name, bits in CHOICES[kind_name]
    ]
    fitting = [plan for plan in plans if memory_gb is None or plan.memory_gb <= memory_gb]
    if not fitting:
        raise ValueError(_describe_misfit(plans[-1], memory_gb))
    if gpu:
        _check_gpu(fitting[0])
    return fitting[0]


def _candidate_kinds(kind: str, num_values: int, gpu: bool) -> list[str]:
    """List the kinds that plan_index considers, the most exact first."""
    if kind in CHOICES:
        return [kind]
    if kind != "auto":
        raise ValueError(f"kind={kind!r} is none of auto, {', '.join(CHOICES)}")
    names = [name for name in CHOICES if name != "hnsw"]
    if num_values > EXACT_VALUES:
        names = [name for name in names if name not in EXACT_KINDS]
    if gpu:
        names = [name for name in names if name in GPU_KINDS]
    return names


def bytes_per_vector(kind: str, dim: int, bits: int = 0, links: int = LINKS) -> float:
    """Return the bytes of one vector, its id and its share of the structure."""
    if kind in EXACT_KINDS:
        return dim * bits / 8 + ID_BYTES
    if kind == "hnsw":
        # 2 x links of the lowest level; 17: links of the levels above on average, offsets, levels
        return GROWTH * (4 * dim + 4 * 2 * links + 17) + ID_BYTES
    # a list keeps row numbers beside its codes
    return GROWTH * (code_bytes(dim, bits) + ID_BYTES) + ID_BYTES


def code_bytes(dim: int, bits: int) -> int:
    """Return the bytes of a vector's code in an IVF list.

    8 bits: one byte a value. Fewer: RaBitQ's signs, further bits and factors.
    """
    if bits == 8:
        return dim
    factors = 8 if bits == 1 else 20
    return math.ceil(dim / 8) + math.ceil(dim * (bits - 1) / 8) + factors


def lists_for(num_vectors: int) -> int:
    """Return the number of k-means cells: the power of 2 nearest to 2 sqrt(N).

    Fewer where a cell would have less than VECTORS_PER_LIST vectors on average.
    """
    wanted = int(2 ** round(math.log2(2 * math.sqrt(num_vectors))))
    return max(1, min(wanted, num_vectors // VECTORS_PER_LIST))


def _plan_variant(
    kind: str, bits: int, num_vectors: int, dim: int, nprobe: int | None, ef_search: int | None
) -> IndexPlan:
    num_lists = lists_for(num_vectors) if kind in IVF_KINDS else 0
    plan = IndexPlan(
        kind,
        num_vectors,
        dim,
        num_lists=num_lists,
        nprobe=min(nprobe or NPROBE, num_lists),
        bits=bits if kind == "ivf_rabitq" else 0,
        links=LINKS if kind == "hnsw" else 0,
        ef_search=(ef_search or EF_SEARCH) if kind == "hnsw" else 0,
        train_size=min(num_vectors, num_lists * TRAIN_PER_LIST),
    )
    memory_gb = plan.shared_gb + num_vectors * bytes_per_vector(kind, dim, bits) / 1e9
    return dataclasses.replace(plan, memory_gb=memory_gb)


def _check_gpu(plan: IndexPlan) -> None:
    if plan.kind not in GPU_KINDS:
        raise ValueError(
            f"faiss has no GPU form of {plan.kind}; set mining.index_kind to auto,"
            f" {', '.join(GPU_KINDS)}, or mining.gpus_per_shard=0"
        )
    if plan.nprobe > GPU_MAX_NPROBE:
        raise ValueError(
            f"nprobe={plan.nprobe} exceeds {GPU_MAX_NPROBE}, the most on a GPU; lower"
            " mining.nprobe, or set mining.gpus_per_shard=0"
        )


def _describe_misfit(smallest: IndexPlan, memory_gb: float | None) -> str:
    each = (smallest.memory_gb - smallest.shared_gb) * 1e9 / smallest.num_vectors
    codes = f"{smallest.bits}-bit " if smallest.bits else ""
    cells = f" and {smallest.shared_gb:.2f} GB of cells" if smallest.num_lists else ""
    return (
        f"{smallest.num_vectors:,} vectors of D={smallest.dim} need {smallest.memory_gb:.2f} GB as"
        f" {codes}{smallest.kind} ({each:.0f} bytes each{cells}), over {memory_gb=}; raise"
        " mining.index_memory_gb, the limit over all shards, and mining.num_shards to divide them"
    )
