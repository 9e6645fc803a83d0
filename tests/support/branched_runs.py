"""A run folder of a few epochs, made without a cluster, to branch from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.encoder.checkpoint import epoch_uri, save_checkpoint, step_uri
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.pipeline.run_folder import RunFolder
from s4g_ray.storage import files
from s4g_ray.storage.manifest import publish, write_part
from tests.conftest import tiny_config

EPOCHS = 4
STEPS = 6  # of an epoch
# the checkpoint of epoch 1 is pruned
PUBLISHED = (0, 2, 3, 4)
BEST = {"epoch": 3, "metric": "recall@1", "value": 0.5}
NUMERICS = {"precision": "fp32", "channels_last": False}


def run_config(run: str, dataset: str, **sections: dict[str, Any]) -> RunConfig:
    """The configuration of the run; keyword arguments change its sections."""
    train = {"epochs": EPOCHS, **sections.pop("train", {})}
    evaluation = {"every_epochs": 1, **sections.pop("evaluation", {})}
    return tiny_config(run, dataset, train=train, evaluation=evaluation, **sections)


def write_run(run: str, dataset: GeoDataset) -> RunFolder:
    """Write a finished run: checkpoints, artefacts of each kind, metrics and a report."""
    config = run_config(run, dataset.uri)
    folder = RunFolder.open(config, dataset, resume=False)
    folder.start()
    encoder = Encoder.build(config.model)
    for epoch in PUBLISHED:
        save_checkpoint(epoch_uri(run, epoch), encoder, None, epoch=epoch, step=STEPS * epoch)
    for step in (10, 15):
        epoch, batch = divmod(step, STEPS)
        save_checkpoint(step_uri(run, step), encoder, None, epoch=epoch, step=step, batch=batch)
    for epoch in range(1, EPOCHS + 1):
        files.write_bytes(folder.path(f"plans/epoch={epoch:04d}.parquet"), b"plan %d" % epoch)
    for kind in ("embeddings", "neighbors", "index"):
        for version in range(1, EPOCHS):
            publish_folder(folder.path(kind, f"v={version:04d}"), kind)
    write_part(folder.path("embeddings/v=0004"), "parts/part-00000", b"in progress", 1)
    files.write_bytes(folder.path("report.html"), b"<html>")
    write_records(folder)
    folder.update(
        status="done",
        best=BEST,
        numerics=NUMERICS,
        exact_engine="torch",
    )
    return folder


def publish_folder(uri: str, kind: str) -> None:
    """Publish a folder of two parts, one in a folder below it."""
    parts = [write_part(uri, name, f"{uri} {name}".encode(), 1) for name in ("a", "queries/b")]
    publish(uri, kind, parts)


def write_records(folder: RunFolder) -> None:
    """Log the run; the validation of epoch 1 has the highest value before that of epoch 3."""
    recalls = {1: 0.4, 2: 0.3, 3: 0.5, 4: 0.1}
    for epoch in range(1, EPOCHS + 1):
        folder.log("workers", during_epoch=epoch, workers=2, after_step=STEPS * (epoch - 1))
        folder.log("step", epoch=epoch, step=STEPS * epoch, loss=1.0)
        folder.log("epoch", epoch=epoch, step=STEPS * epoch, loss=1.0)
        if epoch < EPOCHS:
            folder.log("mining", epoch=epoch, collection="pairs")
        recall = recalls[epoch]
        folder.log("validation", epoch=epoch, **{"recall@1": recall, "recall@5": 1 - recall})
        folder.log("evaluation", epoch=epoch, **{"recall@1": recall})


def read_tree(root: Path | str) -> dict[str, bytes]:
    """Return the content of each file below a local folder, by its relative path."""
    root = Path(root)
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
