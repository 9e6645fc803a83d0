"""What an index will be: kind and sizes, chosen from the number of vectors, D and a memory budget. No FAISS here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["auto", "flat", "sqfp16", "ivf_sq8", "ivf_rabitq", "hnsw"]
EXACT_KINDS = ("flat", "sqfp16")
IVF_KINDS = ("ivf_sq8", "ivf_rabitq")
GPU_KINDS = ("flat", "sqfp16", "ivf_sq8")  # that faiss has a GPU form of
GPU_MAX_K, GPU_MAX_NPROBE = 2048, 2048  # of faiss's GPU kernels
CHOICES: dict[
    str, tuple[tuple[str, int], ...]
] = {  # kinds with their bits a value, the most exact first
    "flat": (("flat", 32),),
    "sqfp16": (("sqfp16", 16),),
    "ivf_sq8": (("ivf_sq8", 8),),
    "ivf_rabitq": (("ivf_rabitq", 4), ("ivf_rabitq", 1)),
    "hnsw": (("hnsw", 32),),
}
# values a query may be compared with (N x D) for auto to search exactly: 1e8 vectors of 1024. A query then takes 2e11
# floating-point operations, as embedding it took (convnext_base, 384 px: 9e10 for each of its two views)
EXACT_VALUES = 1e11
ID_BYTES = 8
LINKS = 32  # of an HNSW vector on each level; twice as many on the lowest
EF_SEARCH = 256
VECTORS_PER_LIST = (
    39  # at least, to train on: fewer are refused by nothing, but k-means is no longer meaningful
)
TRAIN_PER_LIST = 64
NPROBE = 64  # lists that a query visits, at first: a round that misses mining.min_recall says what to raise
GROWTH = 1.5  # lists and graphs grow by doubling: up to twice their size, half of that on average


@dataclass(frozen=True)
class IndexPlan:
    """Everything that decides what an index is made of. JSON by `dataclasses.asdict`; sizes that do not apply are 0."""

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
    def exact(self) -> bool:
        """Whether a search compares a query with every vector."""
        return self.kind in EXACT_KINDS

    @property
    def shared_gb(self) -> float:
        """Of that, what every shard has a copy of: the centroids, and RaBitQ's rotation. Counted once in memory_gb."""
        rotation = 4 * self.dim**2 if self.kind == "ivf_rabitq" else 0
        return (self.num_lists * (4 * self.dim + 64) + rotation) / 1e9

    def shard_gb(self, num_shards: int) -> float:
        """Memory of one of so many shards."""
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
    """Sizes of an index; `auto` takes the most exact kind that fits memory_gb (none: no limit), and a GPU where told.

    The order of auto: flat (float32), sqfp16 (float16), ivf_sq8 (8 bits a value, in k-means cells), ivf_rabitq with
    4 bits, with 1 bit. The two that search exactly are left out above EXACT_VALUES = N x D, where a query would take
    longer to search than to embed. hnsw needs more memory than flat and is taken only where it is asked for; asked for
    by name, ivf_rabitq takes 4 bits where they fit and else 1. There are about 2 sqrt(N) cells; nprobe above their
    number means all of them. Raises ValueError when nothing fits, with the arithmetic, and for what a GPU cannot do.
    """
    if num_vectors < 1 or dim < 1:
        raise ValueError(f"an index of {num_vectors} vectors of D={dim}: both must be at least 1")
    if kind == "auto":
        exact = num_vectors * dim <= EXACT_VALUES
        names = [name for name in CHOICES if name != "hnsw" and (exact or name not in EXACT_KINDS)]
        names = [name for name in names if name in GPU_KINDS] if gpu else names
    elif kind in CHOICES:
        names = [kind]
    else:
        raise ValueError(f"kind={kind!r} is none of auto, {', '.join(CHOICES)}")
    plans = [
        _plan(name, bits, num_vectors, dim, nprobe, ef_search)
        for name in names
        for name, bits in CHOICES[name]
    ]
    fitting = [plan for plan in plans if memory_gb is None or plan.memory_gb <= memory_gb]
    if not fitting:
        raise ValueError(_does_not_fit(plans[-1], memory_gb))
    if gpu:
        _check_gpu(fitting[0])
    return fitting[0]


def bytes_per_vector(kind: str, dim: int, bits: int = 0, links: int = LINKS) -> float:
    """Memory of one vector, its id and its share of the structure, bytes."""
    if kind in EXACT_KINDS:
        return dim * bits / 8 + ID_BYTES
    if (
        kind == "hnsw"
    ):  # links of the lowest level, and some of the levels above, offsets and levels
        return GROWTH * (4 * dim + 4 * 2 * links + 17) + ID_BYTES
    return (
        GROWTH * (code_bytes(dim, bits) + ID_BYTES) + ID_BYTES
    )  # a list keeps row numbers beside its codes


def code_bytes(dim: int, bits: int) -> int:
    """Bytes of a vector's code in an IVF list: 8 bits a value, or RaBitQ's signs, further bits and factors."""
    if bits == 8:
        return dim
    return math.ceil(dim / 8) + math.ceil(dim * (bits - 1) / 8) + (8 if bits == 1 else 20)


def lists_for(num_vectors: int) -> int:
    """k-means cells: the power of 2 nearest to 2 sqrt(N), with VECTORS_PER_LIST at least in each on average."""
    wanted = int(2 ** round(math.log2(2 * math.sqrt(num_vectors))))
    return max(1, min(wanted, num_vectors // VECTORS_PER_LIST))


def _plan(
    kind: str, bits: int, num_vectors: int, dim: int, nprobe: int | None, ef_search: int | None
) -> IndexPlan:
    lists = lists_for(num_vectors) if kind in IVF_KINDS else 0
    plan = IndexPlan(
        kind,
        num_vectors,
        dim,
        num_lists=lists,
        nprobe=min(nprobe or NPROBE, lists),
        bits=bits if kind == "ivf_rabitq" else 0,
        links=LINKS if kind == "hnsw" else 0,
        ef_search=(ef_search or EF_SEARCH) if kind == "hnsw" else 0,
        train_size=min(num_vectors, lists * TRAIN_PER_LIST),
    )
    memory = plan.shared_gb + num_vectors * bytes_per_vector(kind, dim, bits) / 1e9
    return IndexPlan(**{**plan.__dict__, "memory_gb": memory})


def _check_gpu(plan: IndexPlan) -> None:
    if plan.kind not in GPU_KINDS:
        raise ValueError(
            f"faiss has no GPU form of {plan.kind}; set mining.index_kind to auto, {', '.join(GPU_KINDS)}, or"
            " mining.gpus_per_shard=0"
        )
    if plan.nprobe > GPU_MAX_NPROBE:
        raise ValueError(
            f"nprobe={plan.nprobe} exceeds {GPU_MAX_NPROBE}, the most on a GPU; lower mining.nprobe, or set"
            " mining.gpus_per_shard=0"
        )


def _does_not_fit(smallest: IndexPlan, memory_gb: float | None) -> str:
    each = (smallest.memory_gb - smallest.shared_gb) * 1e9 / smallest.num_vectors
    codes = f"{smallest.bits}-bit " if smallest.bits else ""
    cells = f" and {smallest.shared_gb:.2f} GB of cells" if smallest.num_lists else ""
    return (
        f"{smallest.num_vectors:,} vectors of D={smallest.dim} need {smallest.memory_gb:.2f} GB as"
        f" {codes}{smallest.kind} ({each:.0f} bytes each{cells}), over {memory_gb=}; raise mining.index_memory_gb,"
        " the limit over all shards, and mining.num_shards to divide them"
    )
