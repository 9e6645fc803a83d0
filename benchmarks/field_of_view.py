"""Measure recall at narrow fields of view and unknown headings, trained aligned and trained for it.

python -m benchmarks.field_of_view [--work runs/field_of_view] [--seeds 0 1] [--only aligned]

Trains each kind with each seed, one process at a time, and evaluates it at each field of view with
the heading known and unknown. What is done is kept in WORK: after an interruption the same command
continues. The table is recorded when all runs are there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.support.record import record
from s4g_ray.config.data_schema import DataConfig
from s4g_ray.config.loading import load_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import open_dataset
from s4g_ray.data.image_table import ImageTable, View
from s4g_ray.data.images import load_views, try_image
from s4g_ray.datasets import landsat
from s4g_ray.encoder.checkpoint import load_encoder
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.source import find_checkpoint
from s4g_ray.evaluation.metrics import retrieval_metrics
from s4g_ray.pipeline.run import run

CONFIG = Path(__file__).parents[1] / "configs" / "landsat_panorama.yaml"
FOVS = (360.0, 180.0, 90.0, 70.0)
HEADINGS = {"known": "known", "random": "unknown"}  # data.query_heading -> as the table says
KINDS = {  # the keys of section `data` that training sees
    "aligned": ["data.query_heading=known", "data.query_fov_deg=360"],
    "for it": ["data.query_heading=random", "data.query_fov_deg=[70, 360]"],
}
# percent, of CVUSA with unknown heading, as ConGeo reports them for Sample4Geo
PUBLISHED = {"aligned": (16.3, 4.1, 2.5, 1.5), "for it": (93.3, 84.6, 55.1, 40.9)}
TEST_QUERIES = 2  # of each tile
SETTINGS = [
    "train.epochs=2",
    "train.num_workers=1",
    "train.threads_per_worker=1",
    "embedding.num_actors=1",
    "embedding.threads_per_actor=1",
    "sampling.mode=random",
    "evaluation.before_training=false",
    "evaluation.every_epochs=100",
]
Result = list[dict[str, float]]  # metrics at each of FOVS


def make_dataset(work: Path) -> str:
    """Cut the panoramas, unless they are there; return the data set's URI."""
    uri = work / "data"
    if not (uri / "dataset.json").exists():
        landsat.convert(
            "localtileserver",
            str(uri),
            queries="panorama",
            headings="random",
            test_queries_per_tile=TEST_QUERIES,
        )
    return str(uri)


def configure(kind: str, seed: int, work: Path, uri: str) -> RunConfig:
    """Return the configuration of a run."""
    folder = work / name_run(kind, seed)
    own = [f"data.uri={uri}", f"run_dir={folder}", f"seed={seed}"]
    return load_config(CONFIG, [*SETTINGS, *KINDS[kind], *own])


def train(kind: str, seed: int, work: Path) -> int:
    """Train, unless that is done; return the number of steps. Raises SystemExit when stopped."""
    path = work / f"{name_run(kind, seed)}.json"
    if not path.exists():
        config = configure(kind, seed, work, make_dataset(work))
        trained = run(config, resume=(Path(config.run_dir) / "run.json").exists())
        if not trained.finished:
            raise SystemExit(f"{config.run_dir} was stopped; the same command continues it")
        steps = [line["step"] for line in trained.records if line["kind"] == "step"]
        write_whole(path, {"steps": max(steps)})
    return int(json.loads(path.read_text())["steps"])


def measure(kind: str, seed: int, heading: str, work: Path) -> Result:
    """Evaluate a run at each field of view, unless that is done; return its metrics by it.

    As `s4g evaluate RUN DATA --fov 360,180,90,70 --heading HEADING` does, without a Ray session.
    """
    path = work / f"{name_run(kind, seed)}-{heading}.json"
    if not path.exists():
        config = configure(kind, seed, work, make_dataset(work))
        encoder = load_encoder(config.model, find_checkpoint(config.run_dir)).eval()
        dataset = open_dataset(config.data.uri)
        queries = dataset.table("queries", ["test"])
        references = dataset.table("references", ["test"])
        gallery = embed(encoder, references, "references", config.data, seed)
        result = []
        for fov_deg in FOVS:
            seen = {"query_heading": heading, "query_fov_deg": config.data.with_fov(fov_deg)}
            data = config.data.model_copy(update=seen)
            result.append(
                retrieval_metrics(
                    embed(encoder, queries, "queries", data, seed),
                    gallery,
                    queries.place_ids,
                    references.place_ids,
                )
            )
        write_whole(path, result)
        print(kind, seed, heading, [f"{values['recall@1']:.1%}" for values in result], flush=True)
    return list(json.loads(path.read_text()))


def embed(
    encoder: Encoder, table: ImageTable, view: View, data: DataConfig, seed: int
) -> NDArray[np.float32]:
    """Embed all images of a table -> [N, D]."""
    found = []
    for start in range(0, len(table), 64):
        rows = range(start, min(start + 64, len(table)))
        views = load_views(table, rows, view, data, seed=seed)
        images = torch.stack([try_image(image) for image in views])
        with torch.inference_mode():
            found.append(encoder.embed(images, view).numpy())
    return np.concatenate(found)


def name_run(kind: str, seed: int) -> str:
    """Return the name of a run's folder and files."""
    return f"{kind.replace(' ', '_')}-{seed}"


def write_whole(path: Path, value: Any) -> None:
    """Write JSON under another name first: a file that is there is complete."""
    written = path.with_suffix(".tmp")
    written.write_text(json.dumps(value, indent=1))
    written.rename(path)


def make_row(kind: str, heading: str, results: list[Result]) -> list[str]:
    """Return a row of the table: mean R@1, its standard error (R@10) by field of view."""
    row = [kind, HEADINGS[heading]]
    for column in range(len(FOVS)):
        first, tenth = (
            [100 * result[column][name] for result in results] for name in ("recall@1", "recall@10")
        )
        spread = f" ± {stdev(first) / len(first) ** 0.5:.1f}" if len(first) > 1 else ""
        row.append(f"{mean(first):.1f}{spread} ({mean(tenth):.1f})")
    return row


def write_record(seeds: list[int], work: Path) -> None:
    """Record the table, beside the published figures."""
    rows = [
        make_row(kind, heading, [measure(kind, seed, heading, work) for seed in seeds])
        for kind in KINDS
        for heading in HEADINGS
    ]
    for kind, percent in PUBLISHED.items():
        cells = [f"{value:.1f}" for value in percent]
        rows.append([f"{kind}: CVUSA, as ConGeo reports it", "unknown", *cells])
    one = measure("aligned", seeds[0], "known", work)[0]
    measured = f"of seed {seeds[0]} alone"
    if len(seeds) > 1:
        measured = f"mean and standard error of {len(seeds)} seeds"
    record(
        "field_of_view",
        title="Fields of view and headings: panoramas of Landsat",
        text=(
            f"R@1 in percent (R@10 in parentheses), {measured}, of infrared panoramas against the"
            " true-colour tiles of the held-out east. `aligned`: trained with the heading known and"
            " the whole circle. `for it`: one model for all columns, trained with random headings"
            " and fields of view of 70 to 360 degrees. Equal steps. A view of a known heading has"
            " its centre in the north. About ten minutes a run on one core; not part of"
            " `make bench`."
        ),
        command=f"python -m benchmarks.field_of_view --seeds {' '.join(map(str, seeds))}",
        columns=["trained", "heading", *(f"{fov:g} degrees" for fov in FOVS)],
        rows=rows,
        config={
            "config": "configs/landsat_panorama.yaml",
            "overrides": " ".join(SETTINGS),
            "steps": train("aligned", seeds[0], work),
            "seeds": str(seeds),
            "queries": int(one["queries"]),
            "references": int(one["references"]),
        },
        order=92,
    )


def main() -> None:
    """Measure what is asked for, and record the table once everything is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/field_of_view"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", choices=list(KINDS), help="train this kind alone, no table")
    args = parser.parse_args()
    work = args.work.absolute()
    for kind in [args.only] if args.only else KINDS:
        for seed in args.seeds:
            train(kind, seed, work)
            for heading in HEADINGS:
                measure(kind, seed, heading, work)
    if not args.only:
        write_record(args.seeds, work)


if __name__ == "__main__":
    main()
