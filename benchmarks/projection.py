"""Project the time and memory for 10^8 and 10^9 places from measured rates and overheads.

    python -m benchmarks.projection

Rates come from benchmarks/results; a missing one is an error, never a guess. What the driver does
for each place is measured by benchmarks.scale, on a run of every stage. The speed of a cluster of
GPUs is assumed below, from published peaks: no figure of a GPU was measured for this.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.support.record import Cell, read_results, record
from s4g_ray.config.schema import MiningConfig, SamplingConfig
from s4g_ray.index.plan import bytes_per_vector

DIM = 1024
K = 128
IMAGES_PER_PLACE = 2  # a query and a reference
# of ConvNeXt-B at 384 x 384, two a multiplication with its addition (torch's FLOP counter)
FORWARD_FLOP = 90.2e9
TRAINING_FLOP = 3 * FORWARD_FLOP  # forward, and twice as much backward
MIN_RECALL = 0.9  # of IVF against exact search, at k = 128
# kind -> bits a value
KINDS = {
    "flat": 32,
    "sqfp16": 16,
    "ivf_sq8": 8,
    "ivf_rabitq 4 bit": 4,
    "ivf_rabitq 1 bit": 1,
}
CELLS_AROUND = 7  # of a place: its own cell and those that adjoin it, on average
# stage -> the stage of benchmarks.scale whose driver does the same
DRIVEN = {
    "opening the data set": "open",
    "embedding, ConvNeXt-B, 384 px": "embed",
    "exact search, GPUs": "mine",
    "exact search, CPUs": "mine",
    "IVF search, CPUs": "mine",
    "search in cells, CPUs": "mine",
}
DRIVER_BINDS = "the driver's processor, as measured"
PAIRS_PER_CELL = SamplingConfig.model_fields["max_pairs_per_cell"].default


@dataclass(frozen=True)
class Cluster:
    """The assumed cluster: eight nodes of eight NVIDIA H100 SXM."""

    nodes: int = 8
    gpus: int = 64
    gpu_memory_gb: float = 80.0
    cores: int = 768
    memory_gb: float = 8 * 1024.0
    peak_flops: float = 989e12  # of a GPU, dense bf16 (NVIDIA's data sheet)
    # depthwise convolutions and normalisation are bound by memory
    encoder_utilisation: float = 0.35
    search_utilisation: float = 0.40  # a product whose result is reduced to its top-k
    store_gb_per_s: float = 25.0  # object store, all nodes together
    image_kb: float = 60.0  # JPEG of 384 x 384, as `s4g pack` may write them
    decode_ms: float = 0.6  # of a core, for such an image
    augment_ms: float = 3.7  # of a core, beside decoding, in training


@dataclass(frozen=True)
class Rates:
    """Measured rates of one core, and sizes."""

    neighbors_per_s: float
    tree_bytes_per_place: float
    graph_bytes_per_pair: float
    product_flops: float
    planned_pairs_per_s: float
    planning_bytes_per_pair: float
    ivf_build_values_per_s: float  # D of them a vector
    ivf_scan_values_per_s: float
    ivf_nprobe: float  # lists that reach MIN_RECALL
    ivf_lists: float  # lists of the index that ivf_nprobe was measured on
    ivf_vectors: float  # its vectors
    driver_us: Mapping[str, float]  # a place: what the driver does in a stage of benchmarks.scale

    @classmethod
    def read(cls, results: Mapping[str, Mapping[str, Any]]) -> Rates:
        """Read recorded results. Raises SystemExit that names the benchmark to run."""
        evaluation = _result(results, "evaluation")
        kinds = _result(results, "index_kinds")
        threads = float(kinds["config"]["threads"])
        dim = float(kinds["config"]["dim"])
        lists = float(kinds["config"]["lists"])
        rows = [dict(zip(kinds["columns"], row, strict=True)) for row in kinds["rows"]]
        good = [row for row in rows if row["kind"] == "ivf_sq8" and row["recall@128"] >= MIN_RECALL]
        if not good:
            raise SystemExit(
                f"index_kinds: no row of ivf_sq8 has recall@128 >= {MIN_RECALL}; measure a higher"
                " nprobe"
            )
        ivf = max(good, key=lambda row: float(row["queries/s"]))
        nprobe = float(ivf["nprobe or ef"])
        vectors = float(ivf["vectors"])
        vectors_a_query = nprobe * vectors / lists + lists
        product_gflops = _rate(results, "evaluation", "product_gflops")
        return cls(
            neighbors_per_s=_rate(results, "neighbors", "neighbors_per_s_per_core"),
            tree_bytes_per_place=_rate(results, "neighbors", "bytes_per_place"),
            graph_bytes_per_pair=_rate(results, "neighbors", "disk_bytes_per_pair"),
            product_flops=1e9 * product_gflops / evaluation["config"]["threads"],
            planned_pairs_per_s=_rate(results, "planning_scale", "pairs_per_s"),
            planning_bytes_per_pair=_rate(results, "planning_scale", "bytes_per_pair"),
            ivf_build_values_per_s=vectors * dim / ivf["build s"] / threads,
            ivf_scan_values_per_s=ivf["queries/s"] * vectors_a_query * dim / threads,
            ivf_nprobe=nprobe,
            ivf_lists=lists,
            ivf_vectors=vectors,
            driver_us={stage: _rate(results, "scale", stage) for stage in set(DRIVEN.values())},
        )


def _result(results: Mapping[str, Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    if name not in results:
        raise SystemExit(
            f"the projection needs benchmarks/results/{name}.json; run `{_command(name)}`"
        )
    return results[name]


def _rate(results: Mapping[str, Mapping[str, Any]], name: str, key: str) -> float:
    rates = _result(results, name).get("rates", {})
    if key not in rates:
        raise SystemExit(
            f"benchmarks/results/{name}.json holds no rate {key!r}; run `{_command(name)}`"
        )
    return float(rates[key])


def _command(result: str) -> str:
    return f"python -m benchmarks {result.removesuffix('_scale')}"


@dataclass(frozen=True)
class Stage:
    """A stage of the work: its memory or size, its hours and its bottleneck.

    hours None: it takes no time of its own.
    """

    name: str
    gigabytes: float
    hours: float | None
    binds: str
    driver_hours: float = 0.0  # within these hours, of the driver's processor


def project(places: int, rates: Rates, cluster: Cluster) -> list[Stage]:
    """Compute the size and the hours of each stage."""
    stages = [
        Stage("opening the data set", 0.0, 0.0, "the driver's processor"),
        _images("embedding, ConvNeXt-B, 384 px", places, FORWARD_FLOP, cluster.decode_ms, cluster),
        *(_index(kind, places, cluster) for kind in KINDS),
        *_searches(places, rates, cluster),
        *_graphs(places, rates, cluster),
        _images(
            "training, one epoch",
            places,
            TRAINING_FLOP,
            cluster.decode_ms + cluster.augment_ms,
            cluster,
        ),
    ]
    return [_add_driver(stage, places, rates) for stage in stages]


def _add_driver(stage: Stage, places: int, rates: Rates) -> Stage:
    """Add what the driver does; it binds where it takes longer than the rest."""
    if stage.hours is None or stage.name not in DRIVEN:
        return stage
    driver_hours = places * rates.driver_us[DRIVEN[stage.name]] / 1e6 / 3600
    if driver_hours <= stage.hours:
        return replace(stage, driver_hours=driver_hours)
    return replace(stage, hours=driver_hours, binds=DRIVER_BINDS, driver_hours=driver_hours)


def _images(name: str, places: int, flop: float, core_ms: float, cluster: Cluster) -> Stage:
    """Encode every image once; the size is that of the embeddings as float16."""
    images = places * IMAGES_PER_PLACE
    gpu_flops = cluster.gpus * cluster.peak_flops * cluster.encoder_utilisation
    seconds = {
        "GPU arithmetic": images * flop / gpu_flops,
        "decoding and augmenting on CPUs": images * core_ms / 1e3 / cluster.cores,
        "reading the object store": images * cluster.image_kb / 1e6 / cluster.store_gb_per_s,
    }
    binds = max(seconds, key=lambda resource: seconds[resource])
    return Stage(name, images * DIM * 2 / 1e9, seconds[binds] / 3600, binds)


def _index(kind: str, places: int, cluster: Cluster) -> Stage:
    gigabytes = places * _vector_bytes(kind) / 1e9
    on_gpus = cluster.gpus * cluster.gpu_memory_gb
    in_memory = cluster.memory_gb
    if gigabytes >= 0.8 * in_memory:
        fits = "does not fit"
    elif gigabytes >= 0.8 * on_gpus:
        fits = "fits the nodes' memory, not the GPUs"
    else:
        fits = "fits the GPUs"
    return Stage(f"index, {kind}", gigabytes, None, fits)


def _vector_bytes(kind: str) -> float:
    return bytes_per_vector(kind.split()[0], DIM, KINDS[kind])


def _searches(places: int, rates: Rates, cluster: Cluster) -> list[Stage]:
    """Search all places as queries, exactly on GPUs or CPUs and by IVF on CPUs; build the IVF."""
    flop = 2.0 * places**2 * DIM
    half = places * DIM * 2 / 1e9
    lists = rates.ivf_lists * (places / rates.ivf_vectors) ** 0.5
    scanned = (rates.ivf_nprobe * places / lists + lists) * DIM
    gpu_s = flop / (cluster.gpus * cluster.peak_flops * cluster.search_utilisation)
    codes = places * _vector_bytes("ivf_sq8") / 1e9
    build_s = (
        places * DIM / rates.ivf_build_values_per_s / cluster.cores * (lists / rates.ivf_lists)
    )
    cfg = MiningConfig()
    candidates = min(places, CELLS_AROUND * cfg.cell_places + cfg.far_references)
    in_cells = 2.0 * places * candidates * DIM / rates.product_flops / cluster.cores
    return [
        Stage("search in cells, CPUs", half, in_cells / 3600, "CPU arithmetic, grows as places"),
        Stage("exact search, GPUs", half, gpu_s / 3600, "GPU arithmetic, grows as places squared"),
        Stage(
            "exact search, CPUs",
            half,
            flop / rates.product_flops / cluster.cores / 3600,
            "CPU arithmetic",
        ),
        Stage("IVF build, CPUs", codes, build_s / 3600, "assigning vectors to lists on CPUs"),
        Stage(
            "IVF search, CPUs",
            codes,
            places * scanned / rates.ivf_scan_values_per_s / cluster.cores / 3600,
            f"scanning codes, recall >= {MIN_RECALL}",
        ),
    ]


def _graphs(places: int, rates: Rates, cluster: Cluster) -> list[Stage]:
    """Compute the geographic graph on one node, a graph on disk, and a plan by cells.

    A core plans a cell of the lowest level, which hold all pairs; then the cells above are planned.
    So few pairs are left over that the levels above take no time in comparison.
    """
    pairs = places * K
    cells = max(1, 2 ** math.ceil(math.log2(places / PAIRS_PER_CELL)))
    disk = pairs * rates.graph_bytes_per_pair / 1e9
    planning_s = {
        "reading the graph": disk / cluster.store_gb_per_s,
        "the greedy pass, a core a cell": places
        / rates.planned_pairs_per_s
        / min(cluster.cores, cells),
    }
    binds = max(planning_s, key=lambda resource: planning_s[resource])
    return [
        Stage(
            "geographic graph",
            places * rates.tree_bytes_per_place / 1e9,
            pairs / rates.neighbors_per_s / (cluster.cores / cluster.nodes) / 3600,
            "tree queries on one node's CPUs",
        ),
        Stage(
            "graph on disk",
            disk,
            disk / cluster.store_gb_per_s / 3600,
            "writing to the object store",
        ),
        Stage(
            "planning",
            places * (rates.planning_bytes_per_pair + 4 * K) / 1e9,
            planning_s[binds] / 3600,
            binds,
        ),
    ]


def describe_bottleneck(stages: list[Stage]) -> str:
    """Describe the longest of the stages that a run needs, with the fastest of its searches."""
    timed = [stage for stage in stages if stage.hours is not None]
    searches = [stage for stage in timed if "search" in stage.name]
    fastest = min(searches, key=lambda stage: stage.hours or 0)
    needed = [stage for stage in timed if stage not in searches or stage is fastest]
    longest = max(needed, key=lambda stage: stage.hours or 0)
    return f"{longest.name} ({longest.hours:,.1f} h; {longest.binds})"


def main() -> None:
    """Compute and record the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--places", type=int, nargs="*", default=[10**8, 10**9])
    options = parser.parse_args()
    rates = Rates.read(read_results())
    cluster = Cluster()
    found = {places: project(places, rates, cluster) for places in options.places}
    rows: list[list[Cell]] = []
    for places, stages in found.items():
        for stage in stages:
            hours = "-" if stage.hours is None else f"{stage.hours:,.2f}"
            size = f"{stage.gigabytes:,.0f} GB"
            driver = f"{stage.driver_hours:,.3f}" if stage.driver_hours else "-"
            rows.append([places, stage.name, size, hours, driver, stage.binds])
    bottlenecks = "; ".join(
        f"at {places:.0e} places: {describe_bottleneck(stages)}" for places, stages in found.items()
    )
    record(
        "projection",
        title="Projection to 10^8 and 10^9 places",
        text=(
            "computed, not measured: rates of a core and what the driver does for a place from the"
            " results above, the cluster's assumed from published peaks (benchmarks/projection.py"
            " lists them). The cluster is 8 nodes, each 8 x H100 80 GB, 96 cores and 1 TB. What"
            " binds a run with one mining round and"
            f" one epoch: {bottlenecks}."
        ),
        command="python -m benchmarks.projection",
        columns=["places", "stage", "memory or size", "hours", "of them driver", "what binds"],
        rows=rows,
        config={"D": DIM, "k": K, **asdict(cluster)},
        rates=asdict(rates),
        order=100,
    )


if __name__ == "__main__":
    main()
