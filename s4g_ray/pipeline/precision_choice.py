"""Choose the precision of a run: as configured, or the fastest where a worker would run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import ray
from ray.exceptions import RayTaskError

from s4g_ray.config.schema import RunConfig
from s4g_ray.encoder.precision import Numerics, measure_numerics, numerics_choices
from s4g_ray.errors import RunError
from s4g_ray.pipeline.run_folder import RunFolder
from s4g_ray.progress import Reporter
from s4g_ray.training.failures import failure_of


def choose_numerics(
    config: RunConfig, folder: RunFolder, reporter: Reporter, tick: Callable[[], None]
) -> Numerics:
    """Return the precision and memory format of a run, measured once where they are `auto`.

    The choice is kept in run.json: a resumed run takes the same. tick: called once a second while
    a measurement runs; whatever it raises ends the wait. Raises RunError as measure_on_cluster.
    """
    if "numerics" in folder.info:
        return Numerics(**folder.info["numerics"])
    choices = numerics_choices(config.train)
    chosen = choices[0]
    speeds: dict[str, float] = {}
    if len(choices) > 1:
        measured = measure_on_cluster(config, folder.checkpoint(0), reporter, tick)
        chosen = measured[0][0]
        speeds = {numerics.name: round(speed, 1) for numerics, speed in measured}
        shown = ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items())
        reporter.line(f"precision: {chosen.name} (images/s: {shown})")
    folder.update(numerics=asdict(chosen), numerics_measured=speeds)
    return chosen


def measure_on_cluster(
    config: RunConfig, checkpoint: str, reporter: Reporter, tick: Callable[[], None]
) -> list[tuple[Numerics, float]]:
    """Measure each choice in a task with a worker's resources: (choice, images/s), fastest first.

    Raises RunError when the cluster has no room for the task within ray.start_timeout_s.
    """
    cfg = config.train
    options: dict[str, Any] = {
        "num_cpus": cfg.cpus_per_worker,
        "num_gpus": cfg.gpus,
        "label_selector": cfg.label_selector,
    }
    measure: Any = ray.remote(max_calls=1, **options)(measure_numerics)
    device = "cuda" if cfg.use_gpu else "cpu"
    call = measure.remote(config.model, cfg, config.data.reference_size, checkpoint, device)
    deadline = time.monotonic() + config.ray.start_timeout_s
    with reporter.stage("measuring precisions"):
        while not ray.wait([call], timeout=1.0)[0]:
            tick()
            if time.monotonic() > deadline:
                raise RunError(
                    "precisions were not measured within ray.start_timeout_s="
                    f"{config.ray.start_timeout_s:g}: is there room for a worker? set"
                    " train.precision and train.channels_last to do without"
                )
        try:
            return ray.get(call)  # type: ignore[no-any-return]
        except RayTaskError as error:
            failure = failure_of(error.cause, config)
            raise error if failure is None else failure from error
