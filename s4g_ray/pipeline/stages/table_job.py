"""Embed the images of a data set on a Ray cluster, into an embedding table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import VIEWS, View
from s4g_ray.distributed.autoscaling import await_room
from s4g_ray.distributed.session import ray_session
from s4g_ray.encoder.actors import EncoderPool
from s4g_ray.encoder.architecture.size_check import fit_model_to_sizes
from s4g_ray.encoder.checkpoint import checkpoint_stamp, save_checkpoint
from s4g_ray.encoder.embedding.report import EmbeddingReport
from s4g_ray.encoder.embedding_job import embed
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.source import EncoderSource
from s4g_ray.encoder.weights import encode_weights
from s4g_ray.pipeline.preflight import check_resources
from s4g_ray.pipeline.run_folder import Record
from s4g_ray.progress import Reporter
from s4g_ray.storage import files
from s4g_ray.storage.manifest import is_published, open_published
from s4g_ray.storage.part_commits import WORK, claim_folder

MARKER = "embedding.json"  # the values that a folder was begun with


def embed_on_cluster(
    source: EncoderSource,
    config: RunConfig,
    dataset: GeoDataset,
    splits: Sequence[str],
    views: Sequence[View],
    target: str,
    reporter: Reporter,
) -> Record:
    """Publish the embeddings of views at `target`, which this process owns; return their record.

    Raises InputError for a target begun with other values, and the errors of embedding_job.embed.
    """
    numerics = source.numerics_for(config.train)
    model = fit_model_to_sizes(config.model, config.data)
    config = config.model_copy(update={"model": model})
    encoder = source.build_encoder(model, reporter.line)
    made_with = {
        **_describe_encoder(config, encoder),
        "source": source.uri,
        "dataset": dataset.fingerprint,
        "splits": list(splits),
        **asdict(numerics),
    }
    claim_folder(target, MARKER, made_with, "an embedding job")
    if is_published(target):
        reporter.line(f"{target} is finished already")
        return _describe_table(target, made_with)
    checkpoint = source.checkpoint or _save_weights(target, encoder)
    job = partial(
        embed,
        config=config,
        dataset=dataset,
        checkpoint=checkpoint,
        target=target,
        splits=splits,
        numerics=numerics,
        stamp=checkpoint_stamp(config, encoder, checkpoint, dataset.fingerprint),
        views=views,
    )
    report = _run_on_cluster(config, job, f"embedding {', '.join(splits)}", reporter)
    for line in report.lines("image"):
        reporter.line(line)
    return _describe_table(target, made_with)


def _save_weights(target: str, encoder: Encoder) -> str:
    """Write weights that have no checkpoint as one, for the actors; return its URI."""
    checkpoint = files.join(target, WORK, "checkpoint")
    save_checkpoint(checkpoint, encoder, None, epoch=0, step=0)
    return checkpoint


def _run_on_cluster(
    config: RunConfig,
    job: Callable[..., EmbeddingReport],
    stage: str,
    reporter: Reporter,
) -> EmbeddingReport:
    """Run job(pool, on_progress=...) once the cluster has room for embedding actors."""
    fits = partial(check_resources, config, training=False)
    with ray_session(config.ray, config.storage) as nodes:
        await_room(config.ray, fits, nodes, reporter)
        pool = EncoderPool(config.model, config.placed_embedding, config.ray.start_timeout_s)
        with pool, reporter.stage(stage) as update:
            return job(pool, on_progress=update)


def _describe_encoder(config: RunConfig, encoder: Encoder) -> Record:
    return {
        "model": config.model.name,
        "weights_sha256": files.fingerprint(encode_weights(encoder)),
        "preprocessing": encoder.preprocessing(config.data),
        "dtype": config.embedding.dtype,
        "seed": config.seed,
    }


def _describe_table(target: str, made_with: Record) -> Record:
    manifest = open_published(target, "embeddings")
    counts: Record = dict.fromkeys(VIEWS, 0)
    for part in manifest.parts:
        view, _, _ = part.name.partition("/")
        counts[view] += part.rows
    return {
        "uri": target,
        **counts,
        "bad_images": manifest.info["bad_images"],
        "made_with": made_with,
    }
