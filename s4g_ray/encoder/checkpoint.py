"""Publish, find, load and remove the checkpoints of a run.

A checkpoint is published after each epoch and, with checkpoint.every_steps, within epochs too. It
holds model.safetensors, training_state.pt (optimiser and gradient scaler) and checkpoint.json.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

from s4g_ray.config.schema import RunConfig
from s4g_ray.config.training_schema import ModelConfig
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.training_state import decode_state, encode_state
from s4g_ray.encoder.weights import StateDict, check_finite, encode_state_dict, load_weights
from s4g_ray.encoder.weights_file import WEIGHTS
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
# remedies for weights that are not finite
RESTART = (
    "The newest checkpoint stays; resume from it or an earlier one with a lower learning rate or"
    " more precision: --resume --from-epoch N train.learning_rate=... train.precision=fp32"
)
OTHER_WEIGHTS = "Choose other weights"


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint and the content of its checkpoint.json, the progress of training."""

    uri: str
    info: Mapping[str, Any]

    @classmethod
    def read(cls, uri: str) -> Self:
        """Read a checkpoint. Raises RunError when it is not published."""
        return cls(uri, open_published(uri, "checkpoint").info)

    @property
    def epoch(self) -> int:
        """Return the number of finished epochs."""
        return int(self.info["epoch"])

    @property
    def step(self) -> int:
        """Return the number of batches trained on, over all epochs."""
        return int(self.info["step"])

    @property
    def batch(self) -> int:
        """Return the number of batches trained on in the unfinished epoch; 0 between epochs."""
        return int(self.info.get("batch", 0))

    @property
    def order(self) -> tuple[int, int]:
        """Return a sort key that rises as training proceeds."""
        return self.step, self.epoch

    def training_state(self) -> dict[str, Any] | None:
        """Read the state of optimiser and gradient scaler to the CPU; None before training.

        Raises RunError when the file was altered, and as decode_state.
        """
        part = open_published(self.uri, "checkpoint").part(STATE)
        if part is None:
            return None
        return decode_state(read_part(self.uri, part), files.join(self.uri, STATE))

    def check_readable(self) -> None:
        """Read all files. Raises RunError when one is missing or was altered."""
        for part in open_published(self.uri, "checkpoint").parts:
            read_part(self.uri, part)


def save_checkpoint(
    uri: str,
    encoder: Encoder,
    state: Mapping[str, Any] | None,
    *,
    epoch: int,
    step: int,
    **extra_info: Any,
) -> None:
    """Publish a checkpoint of an encoder, as publish_checkpoint does."""
    publish_checkpoint(
        uri,
        encoder.state_dict(),
        state,
        dim=encoder.dim,
        epoch=epoch,
        step=step,
        **extra_info,
    )


def publish_checkpoint(
    uri: str,
    weights: StateDict,
    state: Mapping[str, Any] | None,
    *,
    dim: int,
    epoch: int,
    step: int,
    **extra_info: Any,
) -> None:
    """Publish a checkpoint: weights, training state and checkpoint.json.

    weights: state dict of an encoder of embeddings [D], D = dim. state: of optimiser and gradient
    scaler; None before training. epoch: number of finished epochs. step: number of batches trained
    on. extra_info: more entries of checkpoint.json (plain values).

    Raises RunError, before anything is written, when weights are not finite.
    """
    remedy = RESTART if step else OTHER_WEIGHTS
    check_finite(weights, f"the weights after step {step}", remedy)
    files.remove(uri)  # files of an interrupted upload
    parts = [write_part(uri, WEIGHTS, encode_state_dict(weights), 1)]
    if state is not None:
        data = encode_state({**state, "epoch": epoch, "step": step})
        parts.append(write_part(uri, STATE, data, 1))
    info = {
        "epoch": epoch,
        "step": step,
        "weights_sha256": parts[0].sha256,
        "dim": dim,
        **extra_info,
    }
    parts.append(write_part(uri, "checkpoint.json", json.dumps(info).encode(), 1))
    publish(uri, "checkpoint", parts, info=info)


def epoch_uri(run: str, epoch: int) -> str:
    """Return the URI of the checkpoint after an epoch."""
    return files.join(run, FOLDER, f"epoch={epoch:04d}")


def step_uri(run: str, step: int) -> str:
    """Return the URI of a checkpoint within an epoch, after so many steps."""
    return files.join(run, FOLDER, f"step={step:04d}")


def list_checkpoints(run: str) -> list[Checkpoint]:
    """Return all published checkpoints of a run's folder, in the order of training."""
    folder = files.join(run, FOLDER)
    uris = [epoch_uri(run, n) for n in published_versions(folder, "epoch")]
    uris += [step_uri(run, n) for n in published_versions(folder, "step")]
    return sorted(map(Checkpoint.read, uris), key=lambda checkpoint: checkpoint.order)


def newest_checkpoint(run: str) -> Checkpoint | None:
    """Return the published checkpoint from which training resumes; None when there is none."""
    folder = files.join(run, FOLDER)
    epoch = latest_version(folder, "epoch")
    step = latest_version(folder, "step")
    found = []
    if epoch is not None:
        found.append(Checkpoint.read(epoch_uri(run, epoch)))
    if step is not None:
        try:
            found.append(Checkpoint.read(step_uri(run, step)))
        except StoreError:
            raise
        except RunError:  # removed in the meantime, after a newer epoch was published
            pass
    return max(found, key=lambda checkpoint: checkpoint.order, default=None)


def prune_checkpoints(run: str, *, keep: int, epochs: Collection[int], since: int) -> None:
    """Remove old checkpoints of a run.

    Keeps the `keep` newest, the untrained one, those after the given epochs, and those after epoch
    `since` and later ones. Removes also the files of interrupted uploads older than the newest
    checkpoint.
    """
    found = list_checkpoints(run)
    newest = found[-1]
    trained = [checkpoint for checkpoint in found if checkpoint.order > (0, 0)]
    kept = {checkpoint.uri for checkpoint in trained[-keep:]}
    for checkpoint in found:
        is_needed = checkpoint.epoch in {0, *epochs} or checkpoint.epoch >= since
        if checkpoint.batch == 0 and is_needed:
            kept.add(checkpoint.uri)
    folder = files.join(run, FOLDER)
    old = [epoch_uri(run, n) for n in list_versions(folder, "epoch") if n <= newest.epoch]
    old += [step_uri(run, n) for n in list_versions(folder, "step") if n <= newest.step]
    for uri in old:
        if uri not in kept:
            files.remove(uri)


def checkpoint_stamp(
    config: RunConfig, encoder: Encoder, checkpoint: str, fingerprint: str
) -> Stamp:
    """Return the stamp of artefacts computed with a checkpoint on a data set (its fingerprint)."""
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
    """Load the encoder of a published checkpoint.

    Raises RunError when the checkpoint is unpublished or altered.
    """
    part = open_published(checkpoint, "checkpoint").part(WEIGHTS)
    if part is None:
        raise RunError(f"{checkpoint} holds no {WEIGHTS}")
    encoder = Encoder.build(cfg, weights=False)
    load_weights(encoder, read_part(checkpoint, part), files.join(checkpoint, WEIGHTS))
    return encoder
