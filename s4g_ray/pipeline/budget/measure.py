"""Measure the rates of a run on this machine, within some seconds.

Images are real ones of the data set, the first of each table. The encoder has random weights: none
are loaded or downloaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as pads
import torch

from s4g_ray.config.schema import RunConfig
from s4g_ray.data.batches.pair_batch import PairBatch
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import VIEWS, ImageTable, View
from s4g_ray.data.images import load_pixels
from s4g_ray.data.pair_loader import PairLoader
from s4g_ray.data.pairs import PairTable
from s4g_ray.data.places import Places
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics, numerics_choices
from s4g_ray.errors import BadImageError, InputError
from s4g_ray.evaluation.metrics import retrieval_metrics
from s4g_ray.index.rates import shortest_time
from s4g_ray.pipeline.budget.rates import Rates
from s4g_ray.pipeline.budget.sizes import RunSizes
from s4g_ray.progress import Update
from s4g_ray.sampling.geographic_neighbors import geographic_graph
from s4g_ray.sampling.sampler import plan_batches
from s4g_ray.storage import files
from s4g_ray.training.step import TrainingStep

SAMPLE = 32  # images of each view, and pairs
STEP_PAIRS = 8  # of a step on a CPU
PLACES = 20_000  # that planning is measured with
MEASURE_S = 1.5  # for each of the encoder's passes
WRITTEN = 64_000_000  # bytes
LOADED = "s4g_ray.training.worker"  # what a worker's process loads


def measure_rates(
    config: RunConfig,
    dataset: GeoDataset,
    sizes: RunSizes,
    encoder: Encoder,
    on_progress: Update,
) -> Rates:
    """Measure all rates that this machine can: those of GPUs need one here. 10 s or more.

    Raises BadImageError when sampled images cannot be decoded.
    """
    tables = {view: _sample_table(dataset, config, view) for view in VIEWS}
    steps: dict[str, Callable[[], float | None]] = {
        "graph_place_s": lambda: _measure_neighbors(config, sizes),
        "plan_pair_s": lambda: _measure_planning(config, sizes),
        "decode_s": lambda: _measure_decoding(config, tables),
        "load_pair_s": lambda: _measure_loading(config, tables),
        "embed_s": lambda: _measure_embedding(config, encoder),
        "train_pair_s": lambda: _measure_training(config, encoder),
        "score_s": lambda: _measure_scoring(sizes.dim),
        "write_bytes_s": lambda: _measure_writing(config.run_dir),
        "process_start_s": _measure_start,
    }
    found: dict[str, float | None] = {}
    torch.set_flush_denormal(True)  # of random weights, which take many times as long
    try:
        for number, (name, measure) in enumerate(steps.items()):
            on_progress(number, len(steps))
            found[name] = measure()
    finally:
        torch.set_flush_denormal(False)
    return Rates(source="this machine", **found)  # type: ignore[arg-type]


def _sample_table(dataset: GeoDataset, config: RunConfig, view: View) -> ImageTable:
    """Read the first SAMPLE rows of a view's train split."""
    split = config.data.train_split
    source = dataset.queries if view == "queries" else dataset.references
    head = pads.dataset(source.head(SAMPLE, filter=pc.field("split") == split))
    if view == "queries":
        return replace(dataset, queries=head).table(view, [split])
    return replace(dataset, references=head).table(view, [split])


def _measure_decoding(config: RunConfig, tables: dict[View, ImageTable]) -> float:
    """Return seconds of a processor for an image, as embedding decodes it."""
    started = time.process_time()
    num_images = 0
    for view, table in tables.items():
        rows = range(len(table))
        for image in load_pixels(table, rows, view, config.data, seed=config.seed):
            if isinstance(image, BadImageError) and config.data.on_bad_image == "fail":
                raise image
            num_images += 1
    return (time.process_time() - started) / max(num_images, 1)


def _measure_loading(config: RunConfig, tables: dict[View, ImageTable]) -> float:
    """Return seconds of a processor for a pair, as a training worker loads and augments it."""
    count = min(len(table) for table in tables.values())
    device = "cuda" if config.train.use_gpu else "cpu"
    loader = PairLoader(
        tables["queries"],
        tables["references"],
        config.data,
        config.augmentation,
        seed=config.seed,
        on_device=config.augmentation.is_on_device(device),
    )
    batches = [table.ids[:count].reshape(-1, 1) for table in tables.values()]
    views = dict(zip(tables, batches, strict=True))
    with loader:
        started = time.process_time()
        for batch in loader.load(views["queries"], views["references"], epoch=0):
            batch.augment()
        return (time.process_time() - started) / max(count, 1)


def _device(*, on_gpu: bool) -> torch.device | None:
    """Return the device that a rate is measured on; None for a GPU where there is none."""
    if not on_gpu:
        return torch.device("cpu")
    return torch.device("cuda") if torch.cuda.is_available() else None


def _numerics(config: RunConfig, device: torch.device) -> Numerics:
    """Return the configured precision, or the likely choice of `auto`."""
    choices = numerics_choices(config.train)
    if device.type == "cuda" and len(choices) > 1:
        return choices[-1]
    return choices[0]


def _measure_embedding(config: RunConfig, encoder: Encoder) -> float | None:
    """Return seconds of one embedding actor for an image, on average over both views."""
    embedding = config.placed_embedding
    device = _device(on_gpu=bool(embedding.gpus_per_actor))
    if device is None:
        return None
    torch.set_num_threads(embedding.threads_per_actor)
    numerics = _numerics(config, device)
    count = embedding.batch_size if device.type == "cuda" else min(embedding.batch_size, STEP_PAIRS)
    encoder = encoder.to(device).eval()
    numerics.prepare(encoder)
    total = 0.0
    for view in VIEWS:
        data = config.data
        size = data.visible_query_size if view == "queries" else data.reference_size
        images = torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8).to(device)

        def embed(images: torch.Tensor = images, view: View = view) -> None:
            with torch.inference_mode():
                numerics.embed(encoder, images, view)
            _synchronise(device)

        total += shortest_time(embed, MEASURE_S) / count
    return total / len(VIEWS)


def _measure_training(config: RunConfig, encoder: Encoder) -> float | None:
    """Return seconds of one worker for a pair: its share of a step, over the pairs of that."""
    train = config.train
    device = _device(on_gpu=train.use_gpu)
    if device is None:
        return None
    torch.set_num_threads(train.threads_per_worker)
    own = train.batch_size // train.workers[1]
    count = own if device.type == "cuda" else max(2, min(own, STEP_PAIRS))
    micro = train.micro_batch_size
    size = None if micro is None else min(micro, count)
    # drawn images lie nowhere; soft labels cost next to nothing beside the encoder
    cfg = train.model_copy(update={"micro_batch_size": size, "soft_labels": 0.0})
    step = TrainingStep(encoder, _numerics(config, device), cfg, device)
    queries, references = (
        torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8)
        for size in (config.data.visible_query_size, config.data.reference_size)
    )
    valid = torch.ones(count, dtype=torch.bool)
    batch = PairBatch(0, np.arange(count), queries, references, valid, ()).to(device)

    def train_once() -> None:
        step.step(batch, seed=0, position=0.0)
        _synchronise(device)

    return shortest_time(train_once, MEASURE_S) / count


def _draw_places(config: RunConfig, sizes: RunSizes) -> tuple[Places, int]:
    """Draw clustered places, and return how many neighbors of each are found."""
    count = min(PLACES, sizes.places)
    rng = np.random.default_rng(0)
    lat = 50 + 0.1 * rng.standard_normal(count)
    places = Places(np.arange(count), lat, 0.1 * rng.standard_normal(count))
    return places, min(config.sampling.neighbor_pool_size, count - 1)


def _measure_neighbors(config: RunConfig, sizes: RunSizes) -> float | None:
    """Return seconds to find a place's geographic neighbors."""
    places, k = _draw_places(config, sizes)
    if config.sampling.mode == "random" or k < 2:
        return None
    few = Places(places.ids[: k + 2], places.lat[: k + 2], places.lon[: k + 2])
    geographic_graph(few, k)  # compiles
    started = time.perf_counter()
    geographic_graph(places, k)
    return (time.perf_counter() - started) / len(places)


def _measure_planning(config: RunConfig, sizes: RunSizes) -> float | None:
    """Return seconds to plan a pair of an epoch."""
    places, k = _draw_places(config, sizes)
    if k < 2:
        return None
    graph = None if config.sampling.mode == "random" else geographic_graph(places, k)
    pairs = PairTable(places.ids, places.ids, places.ids)

    def plan() -> None:
        plan_batches(
            pairs,
            graph,
            batch_size=min(config.train.batch_size, len(places)),
            num_hard_negatives=min(config.sampling.num_hard_negatives, k),
            neighbor_pool_size=k,
            seed=0,
            epoch=1,
        )

    plan()  # compiles
    started = time.perf_counter()
    plan()
    return (time.perf_counter() - started) / len(places)


def _measure_scoring(dim: int) -> float:
    """Return seconds of an evaluation for a score: a query against a reference."""
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((512, dim), dtype=np.float32)
    references = rng.standard_normal((8192, dim), dtype=np.float32)
    places = np.arange(len(references))

    def score() -> None:
        retrieval_metrics(queries, references, places[: len(queries)], places)

    score()  # compiles
    return shortest_time(score, MEASURE_S) / (len(queries) * len(references))


def _measure_writing(run_dir: str) -> float | None:
    """Return the bytes a second that the run's file system takes; None for an object store."""
    if not files.is_local(run_dir):
        return None
    folder = Path(run_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            started = time.perf_counter()
            file.write(bytes(WRITTEN))
            file.flush()
            os.fsync(file.fileno())
            return WRITTEN / (time.perf_counter() - started)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}; set run_dir") from error


def _measure_start() -> float:
    """Return the seconds that a new process takes to load what a worker needs."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {LOADED}"], check=True)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
