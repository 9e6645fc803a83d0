"""S4g embed: a collection into an embedding table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

from s4g_ray.config.loading import override_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.data.image_table import VIEWS, View
from s4g_ray.distributed.autoscaling import await_room
from s4g_ray.distributed.session import ray_session
from s4g_ray.distributed.submitted_job import check_kept
from s4g_ray.encoder.actors import EncoderPool
from s4g_ray.encoder.checkpoint import checkpoint_stamp, load_encoder, save_checkpoint
from s4g_ray.encoder.embedding_job import embed
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.source import open_source
from s4g_ray.encoder.weights import encode_weights
from s4g_ray.errors import InputError
from s4g_ray.pipeline.preflight import check_headings, check_resources
from s4g_ray.pipeline.stages.mine import Record
from s4g_ray.progress import Reporter
from s4g_ray.storage import files, s3_settings
from s4g_ray.storage.manifest import is_published, open_published
from s4g_ray.storage.part_commits import WORK, claim_folder

SPLITS = ("train", "val", "test")
# What a folder was begun with.
EMBEDDING = "embedding.json"


def embed_collection(
    source: str,
    dataset_uri: str,
    target: str,
    *,
    config: RunConfig | None = None,
    overrides: Sequence[str] = (),
    splits: Sequence[str] = SPLITS,
    epoch: int | None = None,
    reporter: Reporter | None = None,
) -> Record:
    """Publish embeddings of both views of some splits at `target`; returns what it holds and was made with.

    The encoder is that of a run (its last checkpoint, or that of `epoch`), an export or weights; `config` and
    `overrides` go before what the source says. The test split brings the gallery with it. After an interruption the
    same call goes on with the parts that are committed; a table that is finished is left as it is. Raises InputError
    for bad input, such as a target begun with other values, and as embedding.embed does.
    """
    reporter, target = reporter or Reporter(), files.absolute(target)
    check_kept("TARGET", target)
    opened = open_source(source, files.absolute(dataset_uri), config=config, epoch=epoch)
    base = override_config(opened.config, overrides)
    s3_settings.apply(base.storage)
    dataset, numerics = open_dataset(base.data.uri), opened.numerics_for(base.train)
    views = _views_of(base, dataset, splits)
    encoder = (
        load_encoder(base.model, opened.checkpoint)
        if opened.checkpoint
        else Encoder.build(base.model)
    )
    made_with = {
        "source": opened.uri,
        "model": base.model.name,
        "weights_sha256": files.fingerprint(encode_weights(encoder)),
        "preprocessing": encoder.preprocessing(base.data),
        "dtype": base.embedding.dtype,
        "seed": base.seed,
        "dataset": dataset.fingerprint,
        "splits": list(splits),
        **asdict(numerics),
    }
    claim_folder(target, EMBEDDING, made_with, "an embedding job")
    if is_published(target):
        reporter.line(f"{target} is finished already")
        return _describe_table(target, made_with)
    checkpoint = opened.checkpoint or files.join(target, WORK, "checkpoint")
    if opened.checkpoint is None:
        save_checkpoint(checkpoint, encoder, None, epoch=0, step=0)
    stamp = checkpoint_stamp(base, encoder, checkpoint, dataset.fingerprint)
    with ray_session(base.ray, base.storage) as nodes:
        await_room(base.ray, partial(check_resources, base, training=False), nodes, reporter)
        pool = EncoderPool(base.model, base.embedding, base.ray.start_timeout_s)
        with pool, reporter.stage(f"embedding {', '.join(splits)}") as update:
            report = embed(
                pool,
                base,
                dataset,
                checkpoint,
                target,
                splits=splits,
                numerics=numerics,
                stamp=stamp,
                views=views,
                on_progress=update,
            )
    for line in report.lines("images"):
        reporter.line(line)
    return _describe_table(target, made_with)


def _views_of(config: RunConfig, dataset: GeoDataset, splits: Sequence[str]) -> list[View]:
    """The views that have rows. Raises InputError where neither has, for unknown splits, and for missing headings."""
    for split in splits:
        if split not in SPLITS:
            raise InputError(f"split {split!r} is none of {', '.join(SPLITS)}")
        check_headings(config, dataset, split)
    gallery = ["gallery"] if config.data.test_split in splits else []
    rows = {"queries": list(splits), "references": [*splits, *gallery]}
    views = [view for view in VIEWS if len(dataset.columns(view, rows[view], ["id"])[0])]
    if not views:
        raise InputError(f"{dataset.uri} holds no image of split {', '.join(splits)}")
    return views


def _describe_table(target: str, made_with: Record) -> Record:
    manifest = open_published(target, "embeddings")
    counts: Record = {
        view: sum(p.rows for p in manifest.parts if p.name.startswith(f"{view}/")) for view in VIEWS
    }
    return {
        "uri": target,
        **counts,
        "bad_images": manifest.info["bad_images"],
        "made_with": made_with,
    }
