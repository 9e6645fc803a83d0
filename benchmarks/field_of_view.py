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

from benchmarks.support.record import record
from s4g_ray.config.loading import load_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.datasets import landsat
from s4g_ray.distributed.session import ray_session
from s4g_ray.pipeline.driver import run
from s4g_ray.pipeline.stages.evaluate import evaluate

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
Result = dict[str, Any]  # recall@1 and recall@10 by heading and field of view, steps


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
    folder = work / f"{kind.replace(' ', '_')}-{seed}"
    own = [f"data.uri={uri}", f"run_dir={folder}", f"seed={seed}"]
    return load_config(CONFIG, [*SETTINGS, *KINDS[kind], *own])


def measure(kind: str, seed: int, work: Path) -> Result:
    """Train and evaluate, unless that is done; return the recalls."""
    path = work / f"{kind.replace(' ', '_')}-{seed}.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    uri = make_dataset(work)
    config = configure(kind, seed, work, uri)
    with ray_session(config.ray, config.storage):  # one for all: it takes long on a busy machine
        trained = run(config, resume=(Path(config.run_dir) / "run.json").exists())
        steps = [line["step"] for line in trained.records if line["kind"] == "step"]
        result: Result = {"steps": max(steps), "recall@1": {}, "recall@10": {}}
        for heading in HEADINGS:
            found = evaluate(config.run_dir, uri, fovs=FOVS, heading=heading)
            metrics = [evaluation.score.metrics["strict"] for evaluation in found]
            for name in ("recall@1", "recall@10"):
                result[name][heading] = [values[name] for values in metrics]
            result["queries"] = metrics[0]["queries"]
            result["references"] = metrics[0]["references"]
    written = path.with_suffix(".tmp")
    written.write_text(json.dumps(result, indent=1))
    written.rename(path)
    print(kind, seed, result, flush=True)
    return result


def make_row(kind: str, heading: str, results: list[Result]) -> list[str]:
    """Return a row of the table: mean R@1 (R@10) by field of view, with the seeds' deviation."""
    row = [kind, HEADINGS[heading]]
    for column in range(len(FOVS)):
        first, tenth = (
            [100 * result[name][heading][column] for result in results]
            for name in ("recall@1", "recall@10")
        )
        spread = f" +- {stdev(first):.1f}" if len(first) > 1 else ""
        row.append(f"{mean(first):.1f}{spread} ({mean(tenth):.1f})")
    return row


def write_record(results: dict[str, list[Result]], seeds: list[int]) -> None:
    """Record the table, beside the published figures."""
    rows = [
        make_row(kind, heading, found) for kind, found in results.items() for heading in HEADINGS
    ]
    for kind, percent in PUBLISHED.items():
        cells = [f"{value:.1f}" for value in percent]
        rows.append([f"{kind}: CVUSA, as ConGeo reports it", "unknown", *cells])
    one = results["aligned"][0]
    record(
        "field_of_view",
        title="Fields of view and headings: panoramas of Landsat",
        text=(
            "R@1 in percent, mean and standard deviation of the seeds (R@10 in parentheses), of"
            " infrared panoramas against the true-colour tiles of the held-out east."
            " `aligned`: trained with the heading known and the whole circle. `for it`: one model"
            " for all columns, trained with random headings and fields of view of 70 to 360"
            " degrees. Equal steps. A view of a known heading has its centre in the north."
        ),
        command="python -m benchmarks.field_of_view",
        columns=["trained", "heading", *(f"{fov:g} degrees" for fov in FOVS)],
        rows=rows,
        config={
            "config": "configs/landsat_panorama.yaml",
            "overrides": " ".join(SETTINGS),
            "steps": one["steps"],
            "seeds": len(seeds),
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
    if args.only:
        for seed in args.seeds:
            measure(args.only, seed, work)
        return
    results = {kind: [measure(kind, seed, work) for seed in args.seeds] for kind in KINDS}
    write_record(results, args.seeds)


if __name__ == "__main__":
    main()
