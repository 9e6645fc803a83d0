"""Rates: the seconds that units of a run's work take."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from s4g_ray.config.loading import load_config
from s4g_ray.errors import InputError
from s4g_ray.pipeline.records import read_records
from s4g_ray.pipeline.run_folder import Record
from s4g_ray.storage import files


@dataclass(frozen=True)
class Rates:
    """Seconds of one unit of work; None where it is not known.

    load_pair_s: of a processor, to read, decode and augment a pair. decode_s: of a processor, to
    read and decode an image for embedding. train_pair_s: of one worker, its share of a step, for
    each of its pairs. embed_s: of one actor, an image. plan_pair_s: to plan an epoch, a pair.
    graph_place_s: to find a place's geographic neighbors. score_s: of a score of evaluation.
    write_bytes_s: bytes a second into the run's folder. process_start_s: of a worker or an actor,
    to start and to load its libraries. includes_loading: train_pair_s and embed_s
    are those of a whole run, with the waits for images.
    """

    load_pair_s: float | None = None
    decode_s: float | None = None
    train_pair_s: float | None = None
    embed_s: float | None = None
    plan_pair_s: float | None = None
    graph_place_s: float | None = None
    score_s: float | None = None
    write_bytes_s: float | None = None
    process_start_s: float | None = None
    includes_loading: bool = False
    source: str = ""

    def updated(self, other: Rates) -> Rates:
        """Return these rates with those that another has in their place."""
        known = {name: value for name, value in vars(other).items() if value is not None}
        return replace(self, **known)


def read_rates(run: str) -> Rates:
    """Return the rates of an earlier run, from its metrics.jsonl; None those that it lacks.

    Raises InputError for a folder without a run, or one without a finished epoch.
    """
    uri = files.absolute(run)
    if not files.exists(files.join(uri, "run.json")):
        raise InputError(f"--rates {run} is no run's folder: run.json is missing")
    config = load_config(files.join(uri, "config.yaml"))
    records = read_records(uri)
    epochs = [r for r in records if r["kind"] == "epoch" and r.get("pairs_per_s")]
    if not epochs:
        raise InputError(f"--rates {run} holds no finished epoch; name another run")
    # the first epoch warms up caches, where there are others
    warm = epochs[1:] or epochs
    train = statistics.median(r["workers"] / r["pairs_per_s"] for r in warm)
    pairs = [_planned_pairs(r, config.train.batch_size) for r in warm]
    plans = [r["plan_s"] / n for r, n in zip(warm, pairs, strict=True) if r.get("plan_s") and n]
    found = Rates(train_pair_s=train, includes_loading=True, source=f"the run {run}")
    embedded = _embedding_seconds(records)
    if embedded:
        actors = config.embedding.actors[1]
        found = replace(found, embed_s=actors * statistics.median(embedded))
    if plans:
        found = replace(found, plan_pair_s=statistics.median(plans))
    return found


def _planned_pairs(epoch: Record, batch_size: int) -> float:
    """Return the pairs of an epoch from its speed and the time of its steps."""
    seconds = (epoch.get("load_s") or 0) + (epoch.get("step_s") or 0)
    return float(epoch["pairs_per_s"] * seconds) or float(batch_size)


def _embedding_seconds(records: Sequence[Record]) -> list[float]:
    """Return the seconds an image of each embedding job, over all its actors."""
    return [
        1 / record["warm_images_per_s"]
        for record in records
        if record["kind"] == "embedding" and record.get("warm_images_per_s")
    ]
