from __future__ import annotations

import csv
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from s4g_ray.config.loading import dump_config, override_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.data.images import load_view
from s4g_ray.data.tables.embedding_table import read_embeddings
from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.encoder.checkpoint import load_encoder
from s4g_ray.encoder.source import find_checkpoint
from s4g_ray.pipeline.records import read_records
from s4g_ray.pipeline.run import run
from tests.conftest import NUM_TEST, NUM_TRAIN, tiny_config
from tests.support.faulty_runs import held
from tests.support.ray_head import Head, ray_head

pytestmark = pytest.mark.cluster
EPOCHS, K = 4, 9
NOTE = "`ray job stop` leaves 3 s for a last checkpoint, below checkpoint.grace_s=25"
OURS = (
    NOTE,
    "data set mine",
    "disk: at most ",
    "run folder ",
    "test_convnext, ",
    "resuming after epoch ",
    "epoch ",
    "  ",
    "report: ",
    "SIGTERM: ",
    "stopped; the newest checkpoint is that of step ",
    "resume with: ray job submit ... -- python jobs/train.py ",
)
RAYS = re.compile(
    r"Running entrypoint for job |\d{4}-\d\d-\d\d .*\t[A-Z]+ [a-z_]+\.py:\d+ -- "
)  # of the submission


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head(num_cpus=8) as found:
        yield found


@pytest.fixture(scope="module")
def folder(synthetic: GeoDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with CSV files, and a configuration for the data set that is to be made of them."""
    made = tmp_path_factory.mktemp("jobs")
    for view in ("queries", "references"):
        with (made / f"{view}.csv").open("w") as file:
            rows = csv.writer(file)
            rows.writerow(["path", "lat", "lon", "split"])
            for i in range(NUM_TRAIN + NUM_TEST):
                path = f"{synthetic.uri}/images/{view}/{i}.png"
                rows.writerow([path, i / 4 - 20, i / 2, "train" if i < NUM_TRAIN else "test"])
    (made / "tiny.yaml").write_text(dump_config(configure(made)))
    return made


def configure(folder: Path) -> RunConfig:
    return tiny_config(
        "runs/tiny",
        str(folder / "data"),
        train={"epochs": EPOCHS, "loader_processes": 1, "log_every_steps": 2},
        mining={
            "every_epochs": EPOCHS // 2,
            "exact_engine": "torch",
            "scope": "cells",
            "cell_places": 8,
            "far_references": 10,
        },
        evaluation={"before_training": False, "every_epochs": EPOCHS},
    )


def check_lines(output: str) -> None:
    """Plain lines, and none but ours and those of the command that submits."""
    assert re.findall(r"[\x00-\x08\x0b-\x1f\x7f]", output) == []
    assert [
        line
        for line in output.splitlines()
        if line and not line.startswith(OURS) and not RAYS.match(line)
    ] == []


def wait_for(what: Callable[[], Any], timeout_s: float = 600) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def result_of(done: subprocess.CompletedProcess[str]) -> Any:
    """The JSON that a job has printed."""
    assert done.returncode == 0
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(("{", "[{"))]
    return json.loads(line)


def test_only_who_has_the_token_submits_and_a_misspelt_key_ends_with_one_message_and_exit_code_2(
    head: Head, folder: Path
) -> None:
    assert (
        "No module named 's4g_ray'"
        in subprocess.run(
            [head.python, "-c", "import ray, torch, s4g_ray"],
            capture_output=True,
            text=True,
            cwd=folder,
            env=head.environment,
            check=False,
        ).stderr
    )
    entrypoint = ("jobs/train.py", "--config", str(folder / "tiny.yaml"))
    refused = head.submit(*entrypoint, RAY_AUTH_TOKEN="0" * 64)
    assert refused.returncode == 1
    assert "AuthenticationError" in refused.stdout
    done = head.submit(*entrypoint, "train.epoch=3")
    assert done.returncode == 1
    assert "s4g: unknown key 'train.epoch'; did you mean 'train.epochs'?" in done.stdout
    assert "Job entrypoint command failed with exit code 2" in done.stdout
    assert "Traceback" not in done.stdout
    assert done.stdout.count("s4g: ") == 2  # in the log, and in the status that ends with it


def test_every_script_works_where_only_dependencies_are_and_a_stopped_run_resumes_to_same_weights(
    head: Head, ray_cluster: None, folder: Path
) -> None:
    data, tiny, runs = str(folder / "data"), str(folder / "tiny.yaml"), folder / "runs"
    done = head.submit(
        "jobs/convert.py", "folder", str(folder), data, "--split-column", "split", "--name", "mine"
    )
    assert done.returncode == 0
    dataset = open_dataset(data)
    assert len(dataset.pairs("train")) == NUM_TRAIN

    train = ("jobs/train.py", "--config", tiny)
    # workers wait for the first checkpoint: the run does not end before it is stopped
    stopping = folder / "stopping"
    waits = json.dumps([held("halted/checkpoints/epoch=0001/training_state", stopping)])
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": "300", "S4G_FAULTS": waits}
    given = json.dumps({"env_vars": variables})
    options = ["--no-wait", "--submission-id=first", f"--runtime-env-json={given}"]
    assert head.submit(*train, f"run_dir={runs}/halted", options=options).returncode == 0
    wait_for(lambda: [r for r in read_records(f"{runs}/halted") if r["kind"] == "step"])
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(head.ray, "stop", "first")
        wait_for(lambda: "SIGTERM: " in head.driver_log("first") or answer.done())
        stopping.touch()
    assert "was stopped" in answer.result().stdout
    assert "STOPPED" in head.ray("status", "first").stdout.upper()
    log = head.ray("logs", "first").stdout
    stopped = re.findall(r"the newest checkpoint is that of step (\d+)\n", log)
    assert len(stopped) == 1
    steps = [r["step"] for r in read_records(f"{runs}/halted") if r["kind"] == "step"]
    assert steps[-1] <= int(stopped[0]) <= steps[-1] + 1
    assert int(stopped[0]) < EPOCHS * NUM_TRAIN // 16
    assert (
        f"resume with: ray job submit ... -- python {' '.join(train)}"
        f" run_dir={runs}/halted --resume\n" in log
    )
    assert NOTE not in log
    check_lines(log)

    done = head.submit(*train, f"run_dir={runs}/halted", "--resume")
    assert done.returncode == 0
    assert f"(step {stopped[0]})" in done.stdout
    assert NOTE in done.stdout
    check_lines(done.stdout)
    check_embeddings_neighbors_and_scores(head, folder, dataset)
    assert run(override_config(configure(folder), [f"run_dir={runs}/whole"])).finished
    weights = f"checkpoints/epoch={EPOCHS:04d}/model.safetensors"
    assert (runs / "halted" / weights).read_bytes() == (runs / "whole" / weights).read_bytes()


def check_embeddings_neighbors_and_scores(head: Head, folder: Path, dataset: GeoDataset) -> None:
    """The other jobs, against the encoder run by hand, sorting, and the metrics of the run."""
    run = str(folder / "runs/halted")
    with ThreadPoolExecutor() as pool:  # the last job waits for none of the others
        evaluated = pool.submit(
            head.submit, "jobs/evaluate.py", run, dataset.uri, "--protocol", "strict", "--json"
        )
        check_embeddings_and_neighbors(head, folder, dataset)
    (scored,) = result_of(evaluated.result())["results"]
    (logged,) = [r for r in read_records(run) if r["kind"] == "evaluation"]
    assert scored["strict"]["recall@1"] == pytest.approx(logged["recall@1"])


def check_embeddings_and_neighbors(head: Head, folder: Path, dataset: GeoDataset) -> None:
    run, table, graph = (str(folder / name) for name in ("runs/halted", "table", "graph"))
    embedded = result_of(head.submit("jobs/embed.py", run, dataset.uri, table, "--json"))
    assert (embedded["queries"], embedded["references"]) == (NUM_TRAIN + NUM_TEST,) * 2
    config, rows = configure(folder), dataset.table("references", ["train", "test"])
    encoder = load_encoder(config.model, find_checkpoint(run)).eval()
    seen = torch.stack(
        [load_view(rows, row, "references", config.data, seed=0) for row in range(len(rows))]
    )
    with torch.inference_mode():
        wanted = torch.nn.functional.normalize(encoder.embed(seen, "references")).numpy()
    stored = read_embeddings(table, "references")
    np.testing.assert_allclose(
        stored.vectors[np.argsort(stored.ids)], wanted, atol=5e-4
    )  # of float16

    keys = (f"sampling.neighbor_pool_size={K}", "mining.exact_engine=torch")
    mined = result_of(
        head.submit("jobs/mine.py", table, graph, *keys, "--dataset", dataset.uri, "--json")
    )
    found, ids = NeighborGraph.load(graph), dataset.table("queries", ["train"]).ids
    assert (mined["places"], mined["recall"]) == (NUM_TRAIN, 1.0)
    assert 0 < mined["dropped_own"] <= NUM_TRAIN
    queries, references = read_embeddings(table, "queries").take(ids), stored.take(ids)
    scores = queries.vectors @ references.vectors.T
    scores[queries.place_ids[:, None] == references.place_ids] = -np.inf
    best = references.place_ids[np.argsort(-scores, axis=1)[:, :K]]
    order = np.argsort(queries.place_ids)
    assert found.place_ids.tolist() == queries.place_ids[order].tolist()
    assert (
        found.neighbors == best[order]
    ).mean() > 0.99  # scores that are equal may stand in either order
