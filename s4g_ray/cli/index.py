"""Define `s4g index plan`: estimate the memory and time of an index before it is built."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s4g_ray.amounts import count_noun, format_bytes, format_duration
from s4g_ray.cli.console import interruptible, make_reporter, print_json
from s4g_ray.errors import InputError

if TYPE_CHECKING:
    from s4g_ray.config.schema import MiningConfig, RunConfig
    from s4g_ray.index.cost import Cost, Rates
    from s4g_ray.index.plan import IndexPlan, Resources

ConfigFile = Annotated[
    str | None,
    typer.Argument(help="A YAML file: its train references, encoder and mining keys."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. mining.num_shards=4")
]
NumVectors = Annotated[
    int | None,
    typer.Option(help="Number of vectors.  [default: the references that a run indexes]"),
]
Dim = Annotated[int | None, typer.Option(help="Values of a vector.  [default: the encoder's]")]
NumQueries = Annotated[
    int | None,
    typer.Option(help="Queries of a round.  [default: the train queries; with --vectors: as many]"),
]
Kind = Annotated[
    str | None,
    typer.Option(help="auto, flat, sqfp16, ivf_sq8, ivf_rabitq or hnsw.  [default: as configured]"),
]
MemoryGb = Annotated[
    float | None, typer.Option(help="Limit over all shards, GB.  [default: as configured]")
]
NumShards = Annotated[str | None, typer.Option(help="Shards, or auto.  [default: as configured]")]
Nodes = Annotated[int | None, typer.Option(help="Nodes that hold shards.  [default: one shard]")]
NodeGb = Annotated[float, typer.Option(help="With --nodes: free memory of a node, GB.")]
NodeCores = Annotated[int, typer.Option(help="With --nodes: cores of a node.")]
NodeGpus = Annotated[int, typer.Option(help="With --nodes: GPUs of a node.")]
NumThreads = Annotated[
    int | None, typer.Option(help="Threads of a shard.  [default: as configured]")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

index_app = typer.Typer(help="Plan the index that mining searches.", no_args_is_help=True)


@index_app.callback()
def index() -> None:
    """Plan the index that mining searches."""


@index_app.command()
def plan(
    config: ConfigFile = None,
    overrides: Overrides = None,
    vectors: NumVectors = None,
    dim: Dim = None,
    queries: NumQueries = None,
    kind: Kind = None,
    memory_gb: MemoryGb = None,
    shards: NumShards = None,
    nodes: Nodes = None,
    node_gb: NodeGb = 64.0,
    node_cores: NodeCores = 16,
    node_gpus: NodeGpus = 0,
    threads: NumThreads = None,
    as_json: AsJson = False,
) -> None:
    """Choose kind and shards of a run's index, and estimate its memory and times.

    Builds nothing. A run with gallery negatives has a second index, of the gallery's references.
    """
    from s4g_ray.config.loading import load_config
    from s4g_ray.config.schema import MiningConfig

    if config and "=" in config:
        raise InputError(
            f"{config}: KEY=VALUE changes a CONFIG; name that first, or use --kind, --memory-gb,"
            " --shards"
        )
    loaded = load_config(config, overrides or []) if config else None
    options = {
        "index_kind": kind,
        "index_memory_gb": memory_gb,
        "num_shards": shards,
        "index_threads": threads,
    }
    values = loaded.mining.model_dump() if loaded else MiningConfig().model_dump()
    values.update({key: value for key, value in options.items() if value is not None})
    mining = _parse_mining(values)
    resources = _parse_nodes(nodes, node_gb, node_cores, node_gpus)
    with interruptible():
        counts = _count_vectors(vectors, queries, loaded)
        num_values = _find_dim(dim, loaded)
        estimates = {
            name: _estimate(num_vectors, num_queries, num_values, mining, resources)
            for name, (num_vectors, num_queries) in counts.items()
        }
    if not as_json:
        for name, estimate in estimates.items():
            _print(estimate, f"references of {name}" if len(estimates) > 1 else "")
    result = estimates["pairs"].as_dict()
    if "gallery" in estimates:
        result["gallery"] = estimates["gallery"].as_dict()
    print_json(as_json, result)


@dataclass(frozen=True)
class _Estimate:
    """The plan of an index, and its estimated memory and times."""

    plan: IndexPlan
    cost: Cost
    rates: Rates
    num_queries: int
    on_gpu: bool

    def as_dict(self) -> dict[str, Any]:
        """Return plain types, for JSON."""
        return {
            "plan": asdict(self.plan),
            "num_shards": self.plan.num_shards,
            "reason": self.plan.reason,
            "shard_gb": self.plan.shard_gb,
            "peak_gb": self.plan.peak_gb,
            "num_queries": self.num_queries,
            "cost": asdict(self.cost),
            "rates": asdict(self.rates),
        }


def _estimate(
    num_vectors: int, num_queries: int, dim: int, mining: MiningConfig, resources: Resources | None
) -> _Estimate:
    from s4g_ray.index.cost import expected_cost
    from s4g_ray.index.plan import plan_for
    from s4g_ray.index.rates import rates_for

    if num_vectors > 0 and num_queries < 1:
        raise InputError(f"--queries {num_queries} is below 1")
    try:
        plan = plan_for(mining, num_vectors, dim, resources, num_queries=num_queries)
    except ValueError as error:
        raise InputError(str(error)) from error
    rates = rates_for(plan, mining)
    cost = expected_cost(plan, rates, num_queries=num_queries)
    return _Estimate(plan, cost, rates, num_queries, mining.gpus_per_shard > 0)


def _parse_nodes(nodes: int | None, gb: float, cores: int, gpus: int) -> Resources | None:
    """Return the room of so many equal nodes; None where no number is given."""
    from s4g_ray.index.plan import Resources

    if nodes is None:
        return None
    if nodes < 1 or gb <= 0 or cores < 1 or gpus < 0:
        raise InputError("--nodes, --node-gb and --node-cores must be above 0")
    return Resources((gb,) * nodes, (float(cores),) * nodes, (float(gpus),) * nodes)


def _parse_mining(values: dict[str, Any]) -> MiningConfig:
    """Validate mining keys as those of a configuration. Raises InputError for a bad value."""
    from s4g_ray.config.loading import parse_config

    return parse_config({"run_dir": "none", "data": {"uri": "none"}, "mining": values}).mining


def _count_vectors(
    vectors: int | None, queries: int | None, config: RunConfig | None
) -> dict[str, tuple[int, int]]:
    """Return the numbers of vectors and queries of each index of a run."""
    if vectors is not None:
        return {"pairs": (vectors, vectors if queries is None else queries)}
    if config is None:
        raise InputError("how many vectors? Give --vectors N and --dim D, or a CONFIG")
    from s4g_ray.data.dataset import open_dataset
    from s4g_ray.data.format.header import CORRECT_KEY
    from s4g_ray.data.train_split import TrainSplit

    dataset = open_dataset(config.data.uri, config.data.image_options, remedy=CORRECT_KEY)
    split = TrainSplit.read(config, dataset)
    sizes = {"pairs": len(split.reference_ids)}
    if split.gallery is not None:
        sizes["gallery"] = len(split.gallery)
    num_queries = len(split.query_ids) if queries is None else queries
    return {name: (size, num_queries) for name, size in sizes.items()}


def _find_dim(dim: int | None, config: RunConfig | None) -> int:
    """Return `dim`, or else D of the encoder.

    Builds the architecture only: loads or allocates no weights.
    """
    if dim is not None:
        return dim
    if config is None:
        raise InputError("how many values has a vector? Give --dim D, or a CONFIG")
    import torch

    from s4g_ray.encoder.encoder import Encoder

    with torch.device("meta"):
        return Encoder.build(config.model, weights=False).dim


def _print(estimate: _Estimate, title: str) -> None:
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", show_header=False, box=None)
    for name, text in _describe(estimate).items():
        table.add_row(name, text)
    reporter = make_reporter(False)
    reporter.console.print(table)
    if estimate.on_gpu:
        note = "Times are extrapolated, by counted work, from recorded rates of a GPU."
    else:
        note = (
            "Times are extrapolated, by counted work, from seconds of measurement on this machine"
            f" with {estimate.rates.num_threads} threads."
        )
    if estimate.plan.num_shards > 1:
        note += " Shards work at the same time, each on cores of its own."
    note += " A run makes the same choice, by cautious rates that are recorded and not measured."
    reporter.line(note)


def _describe(estimate: _Estimate) -> dict[str, str]:
    """Return the rows of the table: name and text."""
    plan = estimate.plan
    cost = estimate.cost
    if plan.is_exact:
        search = f"exact, engine {estimate.rates.engine}"
    else:
        search = "approximate: mining measures its recall"
    sizes = {
        "lists": plan.num_lists,
        "visited by a query": plan.nprobe,
        "bits a value": plan.bits,
        "links": plan.links,
        "candidates of a query": plan.ef_search,
        "trained on": plan.train_size,
    }
    rows = {
        "vectors": f"{plan.num_vectors:,} of D={plan.dim}",
        "kind": f"{plan.kind} ({search})",
        "shards": f"{plan.num_shards}",
    }
    rows.update({name: f"{size:,}" for name, size in sizes.items() if size})
    memory = format_bytes(1e9 * plan.memory_gb)
    if plan.num_shards > 1:
        shard = format_bytes(1e9 * plan.shard_gb)
        memory += f", {shard} in each of {count_noun(plan.num_shards, 'shard')}"
    build = format_duration(cost.build_s)
    if cost.train_s:
        build += f", {format_duration(cost.train_s)} of it training"
    rows["memory of a version"] = memory
    rows["while one is built"] = (
        f"up to {format_bytes(1e9 * plan.peak_gb)} a shard: the version in service, the new one,"
        " and that one's file"
    )
    rows["build"] = build
    rows[f"search of {count_noun(estimate.num_queries, 'query', 'queries')}"] = (
        f"{format_duration(cost.search_s)}, {cost.queries_per_s:,.0f} a second"
    )
    rows["why"] = plan.reason
    return rows
