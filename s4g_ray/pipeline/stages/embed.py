"""`s4g embed`: embed a data set's images into an embedding table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from s4g_ray.config.loading import override_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.data.image_table import VIEWS, View
from s4g_ray.distributed.start_checks import check_session
from s4g_ray.distributed.submitted_job import check_kept
from s4g_ray.encoder.source import open_source
from s4g_ray.errors import InputError
from s4g_ray.pipeline.preflight import check_headings
from s4g_ray.progress import Reporter
from s4g_ray.storage import files, s3_settings
from s4g_ray.storage.manifest import is_published
from s4g_ray.storage.ownership.lease import owning

SPLITS = ("train", "val", "test")


def embed_collection(
    source: str,
    dataset_uri: str,
    target: str,
    *,
    config: RunConfig | None = None,
    overrides: Sequence[str] = (),
    splits: Sequence[str] = SPLITS,
    epoch: int | None = None,
    steal: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Publish embeddings of both views of `splits` at `target`; return the table's description.

    The encoder is that of a run (its last checkpoint, or that of `epoch`), an export or weights;
    `config` and `overrides` override the source's own configuration. The test split includes the
    gallery. After an interruption the same call resumes from the committed parts; a finished table
    is left as it is. steal: take the folder over from a living process, as Lease.acquire. Raises
    InputError for bad input, such as a target begun with other values, and
    the errors of embedding_job.embed.
    """
    reporter = reporter or Reporter()
    target = files.absolute(target)
    check_kept("TARGET", target)
    opened = open_source(source, files.absolute(dataset_uri), config=config, epoch=epoch)
    base = override_config(opened.config, overrides)
    s3_settings.apply(base.storage)
    if not is_published(target):
        check_session(base.ray)
    dataset = open_dataset(base.data.uri, base.data.image_options)
    views = _views_of(base, dataset, splits)
    with owning(target, reporter, steal=steal, interrupts=True):
        # imports torch and Ray, which takes seconds: errors of the input come before
        from s4g_ray.pipeline.stages.table_job import embed_on_cluster

        return embed_on_cluster(opened, base, dataset, splits, views, target, reporter)


def _views_of(config: RunConfig, dataset: GeoDataset, splits: Sequence[str]) -> list[View]:
    """Return the views that have rows in the splits.

    Raises InputError where neither view has any, for unknown splits and for missing headings.
    """
    for split in splits:
        if split not in SPLITS:
            raise InputError(f"split {split!r} is none of {', '.join(SPLITS)}")
        check_headings(config, dataset, split)
    splits_of: dict[View, list[str]] = {"queries": list(splits), "references": list(splits)}
    if config.data.test_split in splits:
        splits_of["references"].append("gallery")
    views = [view for view in VIEWS if len(dataset.columns(view, splits_of[view], ["id"])[0])]
    if not views:
        raise InputError(f"{dataset.uri} holds no image of split {', '.join(splits)}")
    return views
