"""Plan a run: its disk, memory, actors and hours, before anything is started."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from s4g_ray.config.schema import RayConfig, RunConfig
from s4g_ray.distributed.placement import Node
from s4g_ray.distributed.session import ray_session
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.errors import InputError
from s4g_ray.pipeline.budget.disk import Stock, check_room, list_stocks
from s4g_ray.pipeline.budget.hours import Machines, Stage, list_stages, total_seconds
from s4g_ray.pipeline.budget.indexes import PlannedIndex, estimate_costs, plan_indexes
from s4g_ray.pipeline.budget.measure import measure_rates
from s4g_ray.pipeline.budget.memory import ProcessMemory, list_memory
from s4g_ray.pipeline.budget.rates import Rates, read_rates
from s4g_ray.pipeline.budget.sizes import RunSizes
from s4g_ray.pipeline.preflight import check_resources, open_run_data
from s4g_ray.pipeline.run_folder import Record
from s4g_ray.progress import Reporter
from s4g_ray.storage import files, s3_settings
from s4g_ray.storage.s3_settings import StorageConfig


@dataclass(frozen=True)
class RunPlan:
    """What a run will take. faults: what would be refused at its start, and warnings."""

    config: RunConfig
    sizes: RunSizes
    machines: Machines
    rates: Rates
    stocks: Sequence[Stock]
    memory: Sequence[ProcessMemory]
    indexes: dict[str, PlannedIndex]
    stages: Sequence[Stage]
    faults: Sequence[str]

    @property
    def seconds(self) -> float | None:
        """The seconds of the whole run; None where a stage is unknown."""
        return total_seconds(self.config, self.stages)

    def as_record(self) -> Record:
        """Return plain types, for JSON."""
        return {
            "sizes": asdict(self.sizes),
            "machines": asdict(self.machines),
            "rates": asdict(self.rates),
            "disk": [{**asdict(stock), "total": stock.total} for stock in self.stocks],
            "disk_bytes": sum(stock.total for stock in self.stocks),
            "memory": [asdict(process) for process in self.memory],
            "indexes": {name: asdict(index) for name, index in self.indexes.items()},
            "stages": [{**asdict(stage), "total": stage.total} for stage in self.stages],
            "seconds": self.seconds,
            "faults": list(self.faults),
        }


def plan_run(
    config: RunConfig, *, rates_run: str | None = None, reporter: Reporter | None = None
) -> RunPlan:
    """Plan a run on its data set and cluster; start and write nothing.

    rates_run: the folder of an earlier run whose speed counts instead of this machine's. Raises
    InputError for bad input.
    """
    reporter = reporter or Reporter()
    s3_settings.apply(config.storage)
    earlier = None if rates_run is None else read_rates(rates_run)  # first: errors come at once
    with reporter.stage("reading the data set"):
        config, dataset, split = open_run_data(config)
        encoder = Encoder.build(config.model, weights=False)
        sizes = RunSizes.read(dataset, split, encoder)
    machines, nodes = find_machines(config.ray, config.storage)
    with reporter.stage("measuring rates") as update:
        rates = measure_rates(config, dataset, sizes, encoder, update)
        indexes = plan_indexes(config, sizes, nodes)
        costs = estimate_costs(config, sizes, indexes)
    index_bytes = [1e9 * index.plan.memory_gb for index in indexes.values()]
    stocks = list_stocks(config, sizes, index_bytes)
    if earlier is not None:
        rates = rates.updated(earlier)
    plans = {name: index.plan for name, index in indexes.items()}
    return RunPlan(
        config,
        sizes,
        machines,
        rates,
        stocks,
        list_memory(config, sizes, plans),
        indexes,
        list_stages(config, sizes, rates, machines, costs),
        _list_faults(config, nodes, sizes, stocks),
    )


def find_machines(ray: RayConfig, storage: StorageConfig) -> tuple[Machines, list[Node]]:
    """Return the cluster of a run: the running one that is named, or this machine."""
    address = ray.address or os.environ.get("RAY_ADDRESS")
    if address:
        with ray_session(ray, storage) as nodes:
            source = f"the cluster at {address}"
    else:
        num_cpus = ray.num_cpus or os.cpu_count() or 1
        nodes = [Node(num_cpus, torch.cuda.device_count())]
        source = "this machine" if ray.num_cpus is None else "ray.num_cpus on this machine"
    cpus = sum(node.cpus for node in nodes)
    gpus = sum(node.gpus for node in nodes)
    return Machines(cpus, gpus, len(nodes), source, starts_ray=not address), nodes


def _list_faults(
    config: RunConfig, nodes: Sequence[Node], sizes: RunSizes, stocks: Sequence[Stock]
) -> list[str]:
    faults = []
    try:
        warning = check_room(files.absolute(config.run_dir), stocks)
        if warning is not None:
            faults.append(warning)
    except InputError as error:
        faults.append(str(error))
    try:
        check_resources(config, nodes, num_pairs=sizes.pairs)
    except InputError as error:
        faults.append(str(error))
    return faults
