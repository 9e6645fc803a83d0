"""`s4g index`: what an index will need, before one is built."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s4g_ray.cli.console import interruptible, make_reporter, print_json
from s4g_ray.errors import InputError

if TYPE_CHECKING:
    from s4g_ray.config.schema import MiningConfig, RunConfig
    from s4g_ray.index.cost import Cost, Rates
    from s4g_ray.index.plan import IndexPlan

VERSIONS_HELD = 3  # at most: two in service, and one that is built

index_app = typer.Typer(help="The index that mining searches.", no_args_is_help=True)


@index_app.callback()
def index() -> None:
    """The index that mining searches."""


@index_app.command()
def plan(
    config: Annotated[
        str | None,
        typer.Argument(help="A YAML file: its train references, encoder and mining keys."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. mining.num_shards=4")
    ] = None,
    vectors: Annotated[
        int | None,
        typer.Option(help="Number of vectors.  [default: the references that a run indexes]"),
    ] = None,
    dim: Annotated[
        int | None, typer.Option(help="Values of a vector.  [default: the encoder's]")
    ] = None,
    queries: Annotated[
        int | None,
        typer.Option(help="Queries of a round.  [default: the train queries; --vectors: as many]"),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="auto, flat, sqfp16, ivf_sq8, ivf_rabitq or hnsw.  [default: as configured]"
        ),
    ] = None,
    memory_gb: Annotated[
        float | None, typer.Option(help="Limit over all shards, GB.  [default: as configured]")
    ] = None,
    shards: Annotated[int | None, typer.Option(help="Shards.  [default: as configured]")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of a shard.  [default: as configured]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Kind, memory, and expected build and search time of a run's index; builds nothing.

    A run with gallery negatives has a second index, of the gallery's references.
    """
    from s4g_ray.config.loading import load_config
    from s4g_ray.config.schema import MiningConfig

    if config and "=" in config:
        raise InputError(
            f"{config}: KEY=VALUE changes a CONFIG; name that first, or use --kind, --memory-gb, --shards"
        )
    loaded = load_config(config, overrides or []) if config else None
    given = {
        "index_kind": kind,
        "index_memory_gb": memory_gb,
        "num_shards": shards,
        "index_threads": threads,
    }
    base = loaded.mining if loaded else MiningConfig()
    mining = _checked(
        {**base.model_dump(), **{key: value for key, value in given.items() if value is not None}}
    )
    with interruptible():
        counts, size = _counts(vectors, queries, loaded), _dim(dim, loaded)
        expected = {
            name: _expect(num_vectors, asked, size, mining)
            for name, (num_vectors, asked) in counts.items()
        }
    if not as_json:
        for name, one in expected.items():
            _print(one, f"references of {name}" if len(expected) > 1 else "")
    pairs, *gallery = (one.result() for one in expected.values())
    print_json(as_json, {**pairs, **({"gallery": gallery[0]} if gallery else {})})


@dataclass(frozen=True)
class _Expected:
    """An index, and what it will take."""

    plan: IndexPlan
    cost: Cost
    rates: Rates
    queries: int
    shards: int

    def result(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "plan": asdict(self.plan),
            "num_shards": self.shards,
            "shard_gb": self.plan.shard_gb(self.shards),
            "building_gb": VERSIONS_HELD * self.plan.memory_gb,
            "num_queries": self.queries,
            "cost": asdict(self.cost),
            "rates": asdict(self.rates),
        }


def _expect(num_vectors: int, queries: int, dim: int, mining: MiningConfig) -> _Expected:
    from s4g_ray.index.cost import expected_cost, measure_rates
    from s4g_ray.index.recall import plan_for

    try:
        plan = plan_for(mining, num_vectors, dim)
    except ValueError as error:
        raise InputError(str(error)) from error
    if queries < 1:
        raise InputError(f"--queries {queries} is below 1")
    rates = measure_rates(plan, mining.index_threads)
    cost = expected_cost(plan, rates, num_queries=queries, num_shards=mining.num_shards)
    return _Expected(plan, cost, rates, queries, mining.num_shards)


def _checked(values: dict[str, Any]) -> Any:
    """Mining keys with the options in their places, validated as a configuration is."""
    from s4g_ray.config.loading import parse_config

    return parse_config({"run_dir": "none", "data": {"uri": "none"}, "mining": values}).mining


def _counts(
    vectors: int | None, queries: int | None, config: RunConfig | None
) -> dict[str, tuple[int, int]]:
    """Vectors and queries of each index of a run."""
    if vectors is not None:
        return {"pairs": (vectors, vectors if queries is None else queries)}
    if config is None:
        raise InputError("how many vectors? Give --vectors N and --dim D, or a CONFIG")
    from s4g_ray.data.dataset import open_dataset
    from s4g_ray.data.train_split import TrainSplit

    split = TrainSplit.read(config, open_dataset(config.data.uri))
    sizes = {"pairs": len(split.reference_ids)}
    if split.gallery is not None:
        sizes["gallery"] = len(split.gallery)
    asked = len(split.query_ids) if queries is None else queries
    return {name: (size, asked) for name, size in sizes.items()}


def _dim(given: int | None, config: RunConfig | None) -> int:
    """D of the encoder, from its architecture alone: no weights are loaded or even allocated."""
    if given is not None:
        return given
    if config is None:
        raise InputError("of how many values is a vector? Give --dim D, or a CONFIG")
    import torch

    from s4g_ray.encoder.encoder import Encoder

    with torch.device("meta"):
        return Encoder.build(config.model, weights=False).dim


def _print(expected: _Expected, title: str) -> None:
    from rich.table import Table

    plan, cost, rates, shards = expected.plan, expected.cost, expected.rates, expected.shards
    sizes = {
        "lists": plan.num_lists,
        "visited by a query": plan.nprobe,
        "bits a value": plan.bits,
        "links": plan.links,
        "candidates of a query": plan.ef_search,
        "trained on": plan.train_size,
    }
    each = plan.shard_gb(shards)
    searched = (
        f"exact, engine {rates.engine}" if plan.exact else "approximate: mining measures its recall"
    )
    rows = {
        "vectors": f"{plan.num_vectors:,} of D={plan.dim}",
        "kind": f"{plan.kind} ({searched})",
        **{name: f"{size:,}" for name, size in sizes.items() if size},
        "memory of a version": f"{plan.memory_gb:.3g} GB"
        + (f", {each:.3g} GB in each of {shards} shards" if shards > 1 else ""),
        "while one is built": f"up to {VERSIONS_HELD * plan.memory_gb:.3g} GB: two in service and the new one; and a"
        " copy of that while its file is written",
        "build": duration(cost.build_s)
        + (f", {duration(cost.train_s)} of it training" if cost.train_s else ""),
        f"search of {expected.queries:,} queries": f"{duration(cost.search_s)}, {cost.queries_per_s:,.0f} a second",
    }
    table = Table(title=title or None, title_justify="left", show_header=False, box=None)
    for name, text in rows.items():
        table.add_row(name, text)
    reporter = make_reporter(False)
    reporter.console.print(table)
    together = (
        " Shards work at the same time, each on a machine like this one." if shards > 1 else ""
    )
    reporter.line(
        f"Times are extrapolated, by counted work, from seconds of measurement on this machine with {rates.num_threads}"
        f" threads.{together}"
    )


def duration(seconds: float) -> str:
    """A time for people: 0.4 s, 12 min, 3.5 h."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
