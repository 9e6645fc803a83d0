"""`s4g mine`: mine an embedding table into a neighbor graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from s4g_ray.config.loading import override_config, parse_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.distributed.start_checks import check_session
from s4g_ray.distributed.submitted_job import check_kept
from s4g_ray.pipeline.preflight import check_index
from s4g_ray.pipeline.stages.mining_input import find_rows, open_table
from s4g_ray.progress import Reporter
from s4g_ray.storage import files, s3_settings
from s4g_ray.storage.manifest import is_published
from s4g_ray.storage.ownership.lease import owning

# num_hard_negatives, which neighbor_pool_size must not be below, matters in training alone: the
# lowest value
NO_RUN: dict[str, Any] = {
    "run_dir": "-",
    "data": {"uri": "-"},
    "sampling": {"num_hard_negatives": 2},
}


def mine_table(
    embeddings: str,
    target: str,
    *,
    dataset_uri: str | None = None,
    config: RunConfig | None = None,
    overrides: Sequence[str] = (),
    steal: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Publish at `target` the visually nearest places of each query's place; return the record.

    Reads sections mining, ray and storage of the configuration, and sampling.neighbor_pool_size.
    Neighbors are found among all references of the table or, with a data set, among those of its
    data.train_split; protocol strict then excludes semi-positives and places within
    sampling.exclude_radius_m. After an interruption the same call resumes from the index and the
    parts that exist; a finished graph is left as it is. steal: take the folder over from a living
    process, as Lease.acquire. Raises InputError for bad input, such as a target begun with other
    values, and the RunErrors of mining_job.mine and IndexService.build.
    """
    reporter = reporter or Reporter()
    target = files.absolute(target)
    embeddings = files.absolute(embeddings)
    check_kept("TARGET", target)
    base = override_config(config or parse_config(NO_RUN), overrides)
    s3_settings.apply(base.storage)
    if not is_published(target):
        check_session(base.ray)
    table = open_table(embeddings)
    found = find_rows(base, table, dataset_uri)
    if base.mining.scope == "global":
        check_index(base.mining, len(found.reference_ids), table.stamp.dim)
    with owning(target, reporter, steal=steal, interrupts=True):
        # imports Ray and faiss, which takes seconds: errors of the input come before
        from s4g_ray.pipeline.stages.graph_job import mine_on_cluster

        return mine_on_cluster(base, table, dataset_uri, target, found, reporter)
