"""Choose the kind, the sizes and the shards of an index, from N, D, room and expected time.

Pure arithmetic: does not import FAISS.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from s4g_ray.amounts import count_noun, format_bytes, format_duration
from s4g_ray.config.schema import MiningConfig
from s4g_ray.index.cost import Rates, expected_cost, recorded_rates

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
# of a shard: a version and its file while written, and the version in service that it replaces
COPIES_BUILT = 2
COPIES_SWAPPED = 3
PROCESS_GB = 0.5  # of a shard's process without vectors: Python, FAISS, torch, blocks of a search
GPU_SCRATCH_GB = 2.0  # of FAISS and CUDA on a GPU
MAX_SHARDS = 1024


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
    num_shards: int = 1
    swaps: bool = True  # versions replace each other in service; False: one is built, once
    reason: str = ""  # why this kind and so many shards

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

    @property
    def shard_gb(self) -> float:
        """Memory of one version in one shard."""
        return self.shared_gb + (self.memory_gb - self.shared_gb) / self.num_shards

    @property
    def peak_gb(self) -> float:
        """Memory of a shard's process, at most, to be asked of Ray."""
        return (COPIES_SWAPPED if self.swaps else COPIES_BUILT) * self.shard_gb + PROCESS_GB

    @property
    def gpu_gb(self) -> float:
        """Memory of a shard on its GPU, at most."""
        return (2 if self.swaps else 1) * self.shard_gb + GPU_SCRATCH_GB


@dataclass(frozen=True)
class Resources:
    """Free room of the nodes where shards may run, one entry a node."""

    memory_gb: tuple[float, ...]
    cores: tuple[float, ...]
    gpus: tuple[float, ...] = ()  # empty: no node has any
    gpu_memory_gb: float | None = None  # of one GPU; None: unknown, not checked
    free_cpus: tuple[float, ...] = ()  # of Ray's logical CPUs; empty: all cores


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
    """Choose the sizes of an index in one shard; `auto` takes the most exact kind that fits.

    memory_gb None: no limit. gpu: only kinds that a GPU can search. auto tries, in this order:
    flat (float32), sqfp16 (float16), ivf_sq8 (8 bits a value, in k-means cells), ivf_rabitq with 4
    bits, ivf_rabitq with 1 bit; never hnsw, which needs more memory than flat. ivf_rabitq asked
    for by name takes 4 bits where they fit, else 1. There are about 2 sqrt(N) cells; a higher
    nprobe visits all of them, or GPU_MAX_NPROBE on a GPU.

    Raises ValueError when nothing fits, with the arithmetic, and for a kind that a GPU cannot
    search.
    """
    plans = list(_candidates(num_vectors, dim, kind, nprobe, ef_search, gpu))
    fitting = [plan for plan in plans if memory_gb is None or plan.memory_gb <= memory_gb]
    if not fitting:
        raise ValueError(_describe_misfit(plans[-1], memory_gb))
    return fitting[0]


def plan_for(
    cfg: MiningConfig,
    num_vectors: int,
    dim: int,
    resources: Resources | None = None,
    *,
    num_queries: int | None = None,
    rates: Mapping[str, Rates] | None = None,
    bits: int | None = None,
    swaps: bool = True,
) -> IndexPlan:
    """Choose kind and number of shards as section `mining` asks, and say why in plan.reason.

    index_kind auto takes the most exact kind, in plan_index's order, that fits in memory and
    whose expected search of num_queries (None: as many as vectors) ends within max_search_hours;
    where no kind is so fast, the fastest. num_shards auto takes the fewest shards that fit and
    are so fast, at most what the nodes hold: their memory, index_threads cores a shard, and
    cpus_per_shard of their free CPUs.

    resources None: any memory within index_memory_gb, and one shard where the number is auto.
    rates: measured, by kind; recorded_rates stand in for kinds that are missing. bits: of RaBitQ,
    as an earlier plan has them; None leaves them open. swaps: see IndexPlan. Raises ValueError when
    nothing fits, with the arithmetic, for more shards than vectors, and for a kind that a GPU
    cannot search.
    """
    if cfg.num_shards != "auto" and cfg.num_shards > num_vectors:
        raise ValueError(
            f"mining.num_shards={cfg.num_shards} exceeds the {num_vectors:,} vectors; lower it"
        )
    num_queries = num_vectors if num_queries is None else num_queries
    gpu = cfg.gpus_per_shard > 0
    plans = list(_candidates(num_vectors, dim, cfg.index_kind, cfg.nprobe, cfg.ef_search, gpu))
    if bits:
        plans = [plan for plan in plans if plan.bits in (0, bits)]
    plans = [dataclasses.replace(plan, swaps=swaps) for plan in plans]
    choice = _Choice(cfg, resources, num_queries, rates or {})
    misfits: list[str] = []
    too_slow: list[IndexPlan] = []
    for plan in plans:
        sharded = choice.with_shards(plan)
        if sharded is None:
            misfits.append(choice.describe_misfit(plan))
        elif choice.search_hours(sharded) > cfg.max_search_hours:
            too_slow.append(sharded)
        else:
            return choice.explain(sharded, too_slow)
    if not too_slow:
        raise ValueError(misfits[-1])
    return choice.explain(min(too_slow, key=choice.search_hours), too_slow)


class _Choice:
    """What the plans of one index are compared by: room, and expected hours of a round's search."""

    def __init__(
        self,
        cfg: MiningConfig,
        resources: Resources | None,
        num_queries: int,
        rates: Mapping[str, Rates],
    ) -> None:
        self._cfg = cfg
        self._resources = resources
        self._num_queries = num_queries
        self._rates = rates

    def with_shards(self, plan: IndexPlan) -> IndexPlan | None:
        """Return the plan with the number of shards to take; None where it does not fit.

        Takes the fastest number that fits where none is fast enough.
        """
        limit_gb = self._cfg.index_memory_gb
        if limit_gb is not None and plan.memory_gb > limit_gb:
            return None
        best: IndexPlan | None = None
        for count in self._shard_counts(plan.num_vectors):
            sharded = dataclasses.replace(plan, num_shards=count)
            if self._num_fitting(sharded) < count:
                continue
            if best is None or self.search_hours(sharded) < self.search_hours(best):
                best = sharded
            if self.search_hours(sharded) <= self._cfg.max_search_hours:
                break
        return best

    def _shard_counts(self, num_vectors: int) -> list[int]:
        if self._cfg.num_shards != "auto":
            return [self._cfg.num_shards]
        room = self._resources
        if room is None:
            return [1]
        held = [max(int(cores // self._cfg.index_threads), 1) for cores in room.cores]
        if self._cfg.gpus_per_shard:
            held = [int(gpus / self._cfg.gpus_per_shard + 1e-9) for gpus in room.gpus]
        held = [min(pair) for pair in zip(held, self._cpu_limits(room), strict=True)]
        return list(range(1, min(max(sum(held), 1), num_vectors, MAX_SHARDS) + 1))

    def _cpu_limits(self, room: Resources) -> list[int]:
        """Return how many shards the free CPUs of each node allow."""
        each = self._cfg.cpus_per_shard
        free = room.free_cpus or room.cores
        return [int(cpus / each + 1e-9) if each else MAX_SHARDS for cpus in free]

    def _num_fitting(self, plan: IndexPlan) -> int:
        """Return how many shards of a plan the nodes hold."""
        room = self._resources
        if room is None:
            return plan.num_shards
        gpu_share = min(self._cfg.gpus_per_shard, 1.0)
        if gpu_share and room.gpu_memory_gb and plan.gpu_gb > gpu_share * room.gpu_memory_gb:
            return 0
        held = [int(memory_gb / plan.peak_gb) for memory_gb in room.memory_gb]
        if self._cfg.num_shards == "auto" and plan.num_shards > 1:  # one waits for CPUs
            held = [min(pair) for pair in zip(held, self._cpu_limits(room), strict=True)]
        return sum(held)

    def search_hours(self, plan: IndexPlan) -> float:
        """Return the expected hours of a round's search; more shards than cores take turns."""
        threads = self._cfg.index_threads
        gpu = self._cfg.gpus_per_shard > 0
        rates = self._rates.get(plan.kind) or recorded_rates(plan.kind, plan.dim, threads, gpu=gpu)
        hours = expected_cost(plan, rates, num_queries=self._num_queries).search_s / 3600
        room = self._resources
        if room is None or gpu:
            return hours
        return hours * max(1.0, plan.num_shards * threads / max(sum(room.cores), 1))

    def explain(self, plan: IndexPlan, too_slow: list[IndexPlan]) -> IndexPlan:
        """Return the plan with its reason: a sentence with memory, hours and what is slower."""
        time = format_duration(3600 * self.search_hours(plan))
        reason = (
            f"{plan.kind} in {count_noun(plan.num_shards, 'shard')}:"
            f" {format_bytes(1e9 * plan.memory_gb)} a version, a shard up to"
            f" {format_bytes(1e9 * plan.peak_gb)}, {time} to search {self._num_queries:,} queries"
        )
        slower = [other for other in too_slow if other.kind != plan.kind]
        limit = f"mining.max_search_hours={self._cfg.max_search_hours:g}"
        if self.search_hours(plan) > self._cfg.max_search_hours:
            reason += f", above {limit}: nothing that fits is faster"
        elif slower:
            hours = format_duration(3600 * self.search_hours(slower[-1]))
            reason += f"; {slower[-1].kind} would take {hours}, above {limit}"
        elif self._cfg.index_kind == "auto":
            reason += "; the most exact kind that fits"
        if self._cfg.gpus_per_shard and (self._cfg.nprobe or 0) > GPU_MAX_NPROBE:
            lowered = f"mining.nprobe={self._cfg.nprobe} is lowered to {plan.nprobe}"
            reason += f"; {lowered}: a GPU visits at most {GPU_MAX_NPROBE} lists"
        return dataclasses.replace(plan, reason=reason)

    def describe_misfit(self, plan: IndexPlan) -> str:
        """Return why a plan does not fit, with the remedy."""
        limit_gb = self._cfg.index_memory_gb
        if limit_gb is not None and plan.memory_gb > limit_gb:
            return _describe_misfit(plan, limit_gb)
        room = self._resources
        assert room is not None
        if not room.memory_gb:
            return (
                f"no node can hold a shard of mining.gpus_per_shard={self._cfg.gpus_per_shard:g};"
                " lower it, change mining.label_selector, or add nodes"
            )
        sharded = dataclasses.replace(plan, num_shards=self._shard_counts(plan.num_vectors)[-1])
        shards = count_noun(sharded.num_shards, "shard")
        memory = ", ".join(f"{memory_gb:.3g}" for memory_gb in room.memory_gb)
        on_gpu = ""
        if self._cfg.gpus_per_shard and room.gpu_memory_gb:
            on_gpu = f" and {sharded.gpu_gb:.3g} GB of a GPU's {room.gpu_memory_gb:.3g}"
        return (
            f"{plan.num_vectors:,} vectors of D={plan.dim} as {plan.kind} in {shards} need"
            f" {sharded.peak_gb:.3g} GB a shard{on_gpu}; the nodes have {memory} GB free: add"
            " nodes, raise mining.num_shards, or lower model.embedding_dim"
        )


def _candidates(
    num_vectors: int,
    dim: int,
    kind: Kind,
    nprobe: int | None,
    ef_search: int | None,
    gpu: bool,
) -> Iterator[IndexPlan]:
    """Yield the plans of a kind, in one shard, the most exact first."""
    if num_vectors < 1 or dim < 1:
        raise ValueError(f"an index of {num_vectors} vectors of D={dim}: both must be at least 1")
    if kind != "auto" and kind not in CHOICES:
        raise ValueError(f"kind={kind!r} is none of auto, {', '.join(CHOICES)}")
    names = [kind] if kind != "auto" else [name for name in CHOICES if name != "hnsw"]
    if gpu:
        _check_gpu(kind)
        names = [name for name in names if name in GPU_KINDS]
        nprobe = min(nprobe or NPROBE, GPU_MAX_NPROBE)
    for name in names:
        for variant, bits in CHOICES[name]:
            yield _plan_variant(variant, bits, num_vectors, dim, nprobe, ef_search)


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


def _check_gpu(kind: str) -> None:
    if kind != "auto" and kind not in GPU_KINDS:
        raise ValueError(
            f"faiss has no GPU form of {kind}; set mining.index_kind to auto,"
            f" {', '.join(GPU_KINDS)}, or mining.gpus_per_shard=0"
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
