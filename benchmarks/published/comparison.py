"""Compare the published form with this project on tiny data in the layout of CVUSA.

    python -m benchmarks.published.comparison [--places 4000] [--pairs 512] [--epochs 40]

Both forms find neighbors, compose batches, train on the same batches from the same weights without
augmentation, and evaluate. The published form reads the folder by itself, in plain loops.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch

from benchmarks.published import evaluation as published_evaluation
from benchmarks.published.geography import nearest
from benchmarks.published.mining import nearest_places
from benchmarks.published.planning import plan_with_lists
from benchmarks.published.tiny_cvusa import (
    PANORAMA,
    SATELLITE,
    PublishedData,
    draw_positions,
    write_tree,
)
from benchmarks.published.training import PublishedModel, PublishedStep, cosine_with_warmup
from benchmarks.support.record import Cell, record
from s4g_ray.arrays import Floats32, Ints
from s4g_ray.config.data_schema import AugmentConfig, DataConfig
from s4g_ray.config.training_schema import TrainConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import View
from s4g_ray.data.images import load_views, try_image
from s4g_ray.data.pair_loader import PairLoader
from s4g_ray.data.pairs import PairTable
from s4g_ray.data.tables.batch_plan import load_plan
from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.datasets import cvusa
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.evaluation.metrics import retrieval_metrics
from s4g_ray.index.exact_search import exact_top_k
from s4g_ray.sampling.geographic_neighbors import geographic_neighbors
from s4g_ray.sampling.sampler import plan_batches
from s4g_ray.training.step import StepClock, TrainingStep

OFF = AugmentConfig(
    jpeg_probability=0,
    color_probability=0,
    blur_probability=0,
    dropout_probability=0,
    flip_probability=0,
    rotate_probability=0,
)
EPOCHS = 3  # of the schedule
WARMUP_EPOCHS = 1
STEPS = 12
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Composition:
    """Statistics of a plan: neighbors per pair in its batch, of all, and of both ends' batches."""

    neighbors: float
    in_first_tenth: float
    in_last_tenth: float
    share_left_out: float


def describe(
    batches: Sequence[Sequence[int]], neighbors: Mapping[int, Sequence[int]], num_hard: int
) -> Composition:
    """Count how many of the num_hard nearest neighbors of each pair are in its batch."""
    counts = []
    for batch in batches:
        members = set(batch)
        found = [len(members.intersection(neighbors[place][:num_hard])) for place in batch]
        counts.append(sum(found) / len(found))
    tenth = max(1, len(counts) // 10)
    return Composition(
        sum(counts) / len(counts),
        sum(counts[:tenth]) / tenth,
        sum(counts[-tenth:]) / tenth,
        1 - sum(len(batch) for batch in batches) / len(neighbors),
    )


def compose(
    neighbors: Mapping[int, Sequence[int]], epochs: int, sizes: tuple[int, int, int]
) -> tuple[list[Composition], list[Composition]]:
    """Compose batches of some epochs by the published form and here, from the same neighbors.

    sizes: of a batch, of its hard negatives and of their pool.
    """
    batch_size, num_hard, pool_size = sizes
    places = np.array(list(neighbors))
    graph = NeighborGraph(places, np.array(list(neighbors.values())))
    pairs = PairTable(places, places, places)
    published: list[Composition] = []
    here: list[Composition] = []
    for epoch in range(epochs):
        batches = plan_with_lists(
            [(place, 0) for place in places.tolist()],
            {place: list(found) for place, found in neighbors.items()},
            batch_size=batch_size,
            num_hard=num_hard,
            pool_size=pool_size,
            seed=epoch,
        )
        by_lists = [[place for place, _ in batch] for batch in batches]
        published.append(describe(by_lists, neighbors, num_hard))
        plan = plan_batches(
            pairs,
            graph,
            batch_size=batch_size,
            num_hard_negatives=num_hard,
            neighbor_pool_size=pool_size,
            seed=0,
            epoch=epoch,
            protocol="paper",
        )
        here.append(describe(places[plan.batches].tolist(), neighbors, num_hard))
    return published, here


@dataclass(frozen=True)
class TrainedBoth:
    """Losses of the steps, and recalls before and after them, of the published form and here."""

    losses: tuple[list[float], list[float]]
    before: tuple[dict[str, float], dict[str, float]]  # of the same embeddings
    after: tuple[dict[str, float], dict[str, float]]  # each of its own
    mined_alike: float  # share of equal neighbors, from the embeddings before
    located_alike: float  # share of equal neighbors on the ground
    plan: Composition


def make_encoder() -> Encoder:
    """Make a small ConvNeXt whose layers all count: timm starts blocks at a millionth."""
    torch.manual_seed(3)
    backbone = timm.create_model("test_convnext", pretrained=False, num_classes=0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return Encoder(backbone, 0.07, freeze_batch_norm=True)


def train_both(folder: Path, *, batch_size: int, num_steps: int, num_hard: int) -> TrainedBoth:
    """Train both forms on the tree in a folder, on the plan of this project."""
    encoder = make_encoder()
    model = PublishedModel(copy.deepcopy(encoder.model))
    data = DataConfig(
        uri=str(folder / "data"), query_size=PANORAMA, reference_size=SATELLITE, antialias=False
    )
    dataset = cvusa.convert(str(folder / "tree"), data.uri)
    train = PublishedData(folder / "tree", "train", encoder.mean, encoder.std)
    neighbors = train.find_neighbors(2 * num_hard)
    pairs = dataset.pairs("train")
    graph, located_alike = _locate_here(dataset, neighbors)
    plan = plan_batches(
        pairs,
        graph,
        batch_size=batch_size,
        num_hard_negatives=num_hard,
        neighbor_pool_size=2 * num_hard,
        seed=0,
        epoch=1,
        protocol="paper",
    )
    plan.save(str(folder / "plan.parquet"), pairs)
    batches = pairs.place_ids[plan.batches]
    held_out = PublishedData(folder / "tree", "val", encoder.mean, encoder.std)
    first = [embed_here(encoder, dataset, data, view) for view in ("queries", "references")]
    mined_alike = _mine_both(embed_published(model, train), num_hard)
    num_of_all = -(-len(train.files) // batch_size)
    published = PublishedStep(
        model.train(),
        CPU,
        half=False,
        schedule=partial(
            cosine_with_warmup,
            num_warmup=num_of_all * WARMUP_EPOCHS,
            num_steps=num_of_all * EPOCHS,
        ),
    )
    losses = [published.step(*train.load(batch)) for batch in batches[:num_steps].tolist()]
    losses_here = train_here(encoder, dataset, data, str(folder / "plan.parquet"), num_steps)
    last = [embed_here(encoder, dataset, data, view) for view in ("queries", "references")]
    return TrainedBoth(
        losses=(losses, losses_here),
        before=_evaluate_both(first, first),
        after=_evaluate_both(_sort(embed_published(model, held_out)), last),
        mined_alike=mined_alike,
        located_alike=located_alike,
        plan=describe(batches.tolist(), neighbors, num_hard),
    )


Embedded = tuple[Floats32, Ints]  # embeddings[N, D] of places[N]


def _locate_here(
    dataset: GeoDataset, neighbors: Mapping[int, Sequence[int]]
) -> tuple[NeighborGraph, float]:
    """Find neighbors on the ground here; and the share that the published form finds alike."""
    places, lat, lon = dataset.columns("references", ["train"], ["place_id", "lat", "lon"])
    wanted = [neighbors[place] for place in places.tolist()]
    rows, _ = geographic_neighbors(lat, lon, len(wanted[0]))
    found = places[rows]
    return NeighborGraph(places, found), float((found == np.array(wanted)).mean())


def _mine_both(embedded: tuple[Embedded, Embedded], k: int) -> float:
    """Return the share of the nearest references of each query that both forms find alike."""
    queries, references = (_normalise_rows(vectors) for vectors, _ in embedded)
    wanted = nearest_places(torch.from_numpy(queries), torch.from_numpy(references), k)
    rows, _ = exact_top_k(queries, references, k + 1)
    alike = 0
    for query, found in enumerate(rows.tolist()):
        others = [row for row in found if row != query][:k]
        alike += sum(a == b for a, b in zip(others, wanted[query], strict=True))
    return alike / (k * len(queries))


def _normalise_rows(vectors: Floats32) -> Floats32:
    unit: Floats32 = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


@torch.no_grad()
def embed_published(model: PublishedModel, data: PublishedData) -> tuple[Embedded, Embedded]:
    """Embed all pairs: queries and references, with their places."""
    model.eval()
    numbers = list(data.files)
    queries, references = data.load(numbers)
    places = np.array(numbers)
    return (
        (model.embed(queries, "queries").numpy(), places),
        (model.embed(references, "references").numpy(), places),
    )


@torch.no_grad()
def embed_here(encoder: Encoder, dataset: GeoDataset, data: DataConfig, view: View) -> Embedded:
    """Embed the test split of a view, in the order of the places."""
    encoder.eval()
    table = dataset.table(view, ["test"])
    views = load_views(table, range(len(table)), view, data, seed=0)
    images = torch.stack([try_image(image) for image in views])
    return _sort([(encoder.embed(images, view).numpy(), table.place_ids)])[0]


def _sort(embedded: Sequence[Embedded]) -> list[Embedded]:
    found = []
    for vectors, places in embedded:
        order = np.argsort(places)
        found.append((vectors[order], places[order]))
    return found


def train_here(
    encoder: Encoder, dataset: GeoDataset, data: DataConfig, plan: str, num_steps: int
) -> list[float]:
    """Train on a saved plan with protocol=paper; return the losses."""
    query_ids, reference_ids = load_plan(plan)
    cfg = TrainConfig(
        batch_size=query_ids.shape[1], num_workers=1, epochs=EPOCHS, warmup_epochs=WARMUP_EPOCHS
    )
    step = TrainingStep(encoder, Numerics(), cfg, CPU, decay_norms=True)
    clock = StepClock.from_plan(plan, is_published=True)
    queries = dataset.table("queries", ["train"])
    references = dataset.table("references", ["train"])
    losses: list[float] = []
    with PairLoader(queries, references, data, OFF, seed=0) as loader:
        for batch in loader.load(query_ids[:num_steps], reference_ids[:num_steps], epoch=1):
            position = clock.position(0, batch.number, len(losses))
            losses.append(step.step(batch, seed=0, position=position).loss.item())
    return losses


def _evaluate_both(
    published: Sequence[Embedded], here: Sequence[Embedded]
) -> tuple[dict[str, float], dict[str, float]]:
    """Evaluate embeddings of queries and references by each form."""
    (queries, query_places), (references, reference_places) = published
    wanted = published_evaluation.recalls(queries, references, query_places, reference_places)
    (queries, query_places), (references, reference_places) = here
    found = retrieval_metrics(queries, references, query_places, reference_places, protocol="paper")
    return wanted, {name: found[name] for name in wanted}


def _compare_compositions(
    name: str, published: Sequence[Composition], here: Sequence[Composition]
) -> list[list[Cell]]:
    fields: dict[str, Callable[[Composition], float]] = {
        "neighbors of a pair in its batch": lambda found: found.neighbors,
        "the same, first tenth of the batches": lambda found: found.in_first_tenth,
        "the same, last tenth": lambda found: found.in_last_tenth,
        "pairs left out, %": lambda found: 100 * found.share_left_out,
    }
    rows: list[list[Cell]] = []
    for field, value in fields.items():
        cells = [_mean_and_error([value(found) for found in form]) for form in (published, here)]
        rows.append([f"{name}: {field}", *cells])
    return rows


def _mean_and_error(values: Sequence[float]) -> str:
    error = np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.2f} ± {error:.2f}"


def main() -> None:
    """Compare and record the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--places", type=int, default=4000)
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=40)
    arguments = parser.parse_args()
    lat, lon = draw_positions(arguments.places)
    on_ground = dict(enumerate(nearest(lat, lon, 128).tolist()))
    vectors = np.random.default_rng(2).normal(size=(2, arguments.places, 16)).astype(np.float32)
    queries = torch.from_numpy(_normalise_rows(vectors[0]))
    references = torch.from_numpy(_normalise_rows(vectors[0] + vectors[1]))
    mined = nearest_places(queries, references, 128)
    rows = []
    for name, neighbors in (("geographic", on_ground), ("mined", mined)):
        both = compose(neighbors, arguments.epochs, (128, 64, 128))
        rows.extend(_compare_compositions(name, *both))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tree(folder / "tree", arguments.pairs, 256)
        trained = train_both(folder, batch_size=32, num_steps=STEPS, num_hard=8)
    for step in (0, 1, STEPS // 2, STEPS - 1):
        losses = [f"{form[step]:.7f}" for form in trained.losses]
        rows.append([f"loss of step {step + 1}", *losses])
    for moment, recalls in (
        ("the same embeddings", trained.before),
        (f"after {STEPS} steps, each its own weights", trained.after),
    ):
        for key in recalls[0]:
            cells = [f"{100 * form[key]:.2f} %" for form in recalls]
            rows.append([f"{key}, {moment}", *cells])
    difference = np.abs(np.subtract(*trained.losses)).max()
    record(
        "published_comparison",
        title="The published form beside this project, on the same data",
        text=(
            "both forms on tiny data in the layout of CVUSA, on a processor, without augmentation."
            f" Composition: {arguments.places} places, batches of 128, mean and standard error of"
            f" {arguments.epochs} epochs with draws of their own. Training: {arguments.pairs}"
            " pairs, batches of 32, the same weights and plan; the greatest difference of the"
            f" losses of {STEPS} steps is {difference:.1e}. Neighbors found alike: on the ground"
            f" {trained.located_alike:.2%}, mined {trained.mined_alike:.2%}."
        ),
        command="python -m benchmarks.published.comparison",
        columns=["what", "published form", "here"],
        rows=rows,
        config={"places": arguments.places, "pairs": arguments.pairs, "model": "test_convnext"},
        order=80,
    )


if __name__ == "__main__":
    main()
