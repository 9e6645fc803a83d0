"""What a run exports through Ray's metrics, for Prometheus; Ray puts `ray_` before each name."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """A metric of ours: every one has the tag `run`, beside those named here."""

    kind: Literal["gauge", "counter"]
    text: str
    tags: tuple[str, ...] = ()


METRICS = {
    "s4g_epoch": Metric("gauge", "The last finished epoch"),
    "s4g_step": Metric("gauge", "Optimiser steps so far"),
    "s4g_workers": Metric("gauge", "Training workers"),
    "s4g_workers_lost": Metric("counter", "Training workers that died"),
    "s4g_loss": Metric("gauge", "Training loss, mean of the last logged steps"),
    "s4g_learning_rate": Metric("gauge", "Learning rate of the last step"),
    "s4g_temperature": Metric("gauge", "Temperature of the loss"),
    "s4g_pairs_per_second": Metric("gauge", "Pairs trained per second, over all workers, in the last epoch"),
    "s4g_load_wait_ratio": Metric("gauge", "Share of the last epoch in which workers waited for images"),
    "s4g_mining_wait_ratio": Metric("gauge", "Share of the last epoch in which workers waited for its plan"),
    "s4g_graph_age_epochs": Metric("gauge", "Epochs since the graph of the last epoch was mined"),
    "s4g_hardness": Metric("gauge", "Mean number of an anchor's nearest neighbors in its batch, last epoch"),
    "s4g_pairs_left_out": Metric("gauge", "Pairs of the last epoch that no batch took"),
    "s4g_recall": Metric("gauge", "Recall of the last evaluation", ("split", "rank")),
    "s4g_index_recall": Metric("gauge", "Recall of the index against exact search, last round", ("collection",)),
    "s4g_embedding_images_per_second": Metric("gauge", "Images embedded per second by warm actors, last round"),
    "s4g_round_seconds": Metric("gauge", "Seconds of the last mining round"),
    "s4g_rounds_failed": Metric("counter", "Rounds that failed and were tried again or left out"),
    "s4g_queue_length": Metric("gauge", "What waits: rounds, plans, batches loaded ahead", ("queue",)),
    "s4g_bad_images": Metric("counter", "Images that could not be decoded and were left out"),
}
