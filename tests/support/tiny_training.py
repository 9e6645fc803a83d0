"""Overrides that make a configuration train for seconds: an epoch of a tiny encoder."""

from __future__ import annotations

TINY_TRAINING = (
    "model.name=test_convnext",
    "model.pretrained=false",
    "train.epochs=1",
    "train.batch_size=16",
    "train.num_workers=1",
    "train.precision=fp32",
    "train.channels_last=false",
    "sampling.num_hard_negatives=8",
    "sampling.neighbor_pool_size=16",
    "embedding.num_actors=1",
)
