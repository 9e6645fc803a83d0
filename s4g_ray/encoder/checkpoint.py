"""Checkpoints of a run: published after each epoch and, where asked, within one; found, kept and removed."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from s4g_ray.config.schema import ModelConfig, RunConfig
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.weights import WEIGHTS, encode_weights, load_weights
from s4g_ray.errors import RunError, StoreError
from s4g_ray.storage import files
from s4g_ray.storage.manifest import (
    Stamp,
    latest_version,
    list_versions,
    open_published,
    publish,
    published_versions,
    read_part,
    write_part,
)

STATE = "training_state.pt"
FOLDER = "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint: what its checkpoint.json says of where training stands."""

    uri: str
    info: Mapping[str, Any]

    @classmethod
    def read(cls, uri: str) -> Self:
        """Raises RunError when it is not published."""
        return cls(uri, open_published(uri, "checkpoint").info)

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return int(self.info["epoch"])

    @property
    def step(self) -> int:
        """Batches that were trained on, in all epochs."""
        return int(self.info["step"])

    @property
    def batch(self) -> int:
        """Batches of the next epoch's plan that were trained on; 0 but within an epoch."""
        return int(self.info.get("batch", 0))

    @property
    def order(self) -> tuple[int, int]:
        """Rises with training."""
        return self.step, self.epoch

    def training_state(self) -> dict[str, Any] | None:
        """State of optimiser and scaler; none before training.

        Raises RunError when it is not what was published, or holds more than tensors and plain values.
        """
        part = open_published(self.uri, "checkpoint").part(STATE)
        if part is None:
            return None
        data = read_part(self.uri, part)
        try:
            return torch.load(io.BytesIO(data), weights_only=True)  # type: ignore[no-any-return]
        except Exception as error:  # torch raises errors of many kinds
            raise RunError(
                f"{files.join(self.uri, STATE)} is damaged, or holds more than tensors and plain values, and was not"
                f" loaded ({type(error).__name__}); remove {self.uri} and resume"
            ) from error


def save_checkpoint(
    uri: str,
    encoder: Encoder,
    state: Mapping[str, Any] | None,
    *,
    epoch: int,
    step: int,
    **more: Any,
) -> None:
    """Publish weights, training state (of optimiser and scaler; none before training) and checkpoint.json.

    epoch: finished epochs; step: batches trained on; more: what else checkpoint.json tells (plain values).
    """
    files.remove(uri)  # what an upload that was cut off has left
    weights = encode_weights(encoder)
    parts = [write_part(uri, WEIGHTS, weights, 1)]
    if state is not None:
        buffer = io.BytesIO()
        torch.save({**state, "epoch": epoch, "step": step}, buffer)
        parts.append(write_part(uri, STATE, buffer.getvalue(), 1))
    info = {
        "epoch": epoch,
        "step": step,
        "weights_sha256": parts[0].sha256,
        "dim": encoder.dim,
        **more,
    }
    parts.append(write_part(uri, "checkpoint.json", json.dumps(info).encode(), 1))
    publish(uri, "checkpoint", parts, info=info)


def epoch_uri(run: str, epoch: int) -> str:
    """Where an epoch's checkpoint is published."""
    return files.join(run, FOLDER, f"epoch={epoch:04d}")


def step_uri(run: str, step: int) -> str:
    """Where a checkpoint within an epoch is published."""
    return files.join(run, FOLDER, f"step={step:04d}")


def published_checkpoints(run: str) -> list[Checkpoint]:
    """All published checkpoints of a run's folder, as training went."""
    folder = files.join(run, FOLDER)
    uris = [epoch_uri(run, n) for n in published_versions(folder, "epoch")]
    uris += [step_uri(run, n) for n in published_versions(folder, "step")]
    return sorted(map(Checkpoint.read, uris), key=lambda checkpoint: checkpoint.order)


def newest_checkpoint(run: str) -> Checkpoint | None:
    """The published checkpoint with which training goes on."""
    folder = files.join(run, FOLDER)
    epoch, step = (latest_version(folder, key) for key in ("epoch", "step"))
    found = [] if epoch is None else [Checkpoint.read(epoch_uri(run, epoch))]
    if step is not None:
        try:
            found.append(Checkpoint.read(step_uri(run, step)))
        except StoreError:
            raise
        except RunError:  # removed meanwhile: a newer epoch's is there
            pass
    return max(found, key=lambda checkpoint: checkpoint.order, default=None)


def prune_checkpoints(run: str, *, keep: int, epochs: Collection[int], since: int) -> None:
    """Keep the `keep` newest checkpoints, the untrained one, those of some epochs and of all from `since` on.

    What uploads that were cut off before the newest one have left goes too.
    """
    found = published_checkpoints(run)
    kept = {c.uri for c in found if c.batch == 0 and (c.epoch in {0, *epochs} or c.epoch >= since)}
    kept |= {c.uri for c in [c for c in found if c.order > (0, 0)][-keep:]}
    folder, newest = files.join(run, FOLDER), found[-1]
    old = [epoch_uri(run, n) for n in list_versions(folder, "epoch") if n <= newest.epoch]
    old += [step_uri(run, n) for n in list_versions(folder, "step") if n <= newest.step]
    for uri in old:
        if uri not in kept:
            files.remove(uri)


def checkpoint_stamp(
    config: RunConfig, encoder: Encoder, checkpoint: str, fingerprint: str
) -> Stamp:
    """The stamp of what is computed from a checkpoint."""
    info = open_published(checkpoint, "checkpoint").info
    return Stamp(
        step=info["step"],
        weights_sha256=info["weights_sha256"],
        preprocessing=encoder.preprocessing(config.data),
        dataset=fingerprint,
        dim=info["dim"],
        dtype=config.embedding.dtype,
    )


def load_encoder(cfg: ModelConfig, checkpoint: str) -> Encoder:
    """The encoder of a published checkpoint. Raises RunError when it is unpublished or altered."""
    part = open_published(checkpoint, "checkpoint").part(WEIGHTS)
    if part is None:
        raise RunError(f"{checkpoint} holds no {WEIGHTS}")
    encoder = Encoder.build(cfg, weights=False)
    load_weights(encoder, read_part(checkpoint, part), files.join(checkpoint, WEIGHTS))
    return encoder
