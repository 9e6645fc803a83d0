"""Whole tiny runs on a Ray cluster of this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.data.images import load_raw
from s4g_ray.data.tables.batch_plan import load_plan
from s4g_ray.data.tables.embedding_table import read_embeddings
from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.data.train_split import TrainSplit
from s4g_ray.encoder.actors import EncoderPool
from s4g_ray.encoder.checkpoint import (
    Checkpoint,
    checkpoint_stamp,
    load_encoder,
    save_checkpoint,
)
from s4g_ray.encoder.embedding_job import embed
from s4g_ray.encoder.precision import Numerics
from s4g_ray.errors import BadImageError, InputError, RunError
from s4g_ray.evaluation.gradient_correlation import gradient_correlation_embeddings
from s4g_ray.pipeline.planner import Planner
from s4g_ray.pipeline.records import EmbeddingRecord, RunRecord, read_records
from s4g_ray.pipeline.report.examples import Example
from s4g_ray.pipeline.report.page import write_report
from s4g_ray.pipeline.rounds.graphs import RunGraphs
from s4g_ray.pipeline.run import run
from s4g_ray.pipeline.run_folder import RunFolder, RunResult
from s4g_ray.sampling.sampler import plan_batches
from s4g_ray.storage import files
from s4g_ray.storage.manifest import is_published
from tests.conftest import NUM_TEST, NUM_TRAIN, SIZE, tiny_config, write_synthetic
from tests.support.logging_tools import Tools

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("warm_pool")]
Tiny = tuple[RunConfig, RunResult]
ONE_WORKER = {
    "num_workers": 1
}  # of runs that end early: a worker takes 8 s of a processor to start


class Receiver:
    """A callback that keeps what it receives."""

    def __init__(self) -> None:
        self.records: list[RunRecord] = []

    def on_record(self, record: RunRecord) -> None:
        self.records.append(record)


@pytest.fixture(scope="module")
def receiver() -> Receiver:
    """The callback of the run `tiny`."""
    return Receiver()


@pytest.fixture(scope="module")
def tiny(
    synthetic: GeoDataset,
    warm_pool: None,
    tmp_path_factory: pytest.TempPathFactory,
    receiver: Receiver,
) -> Tiny:
    config = tiny_config(
        tmp_path_factory.mktemp("runs") / "tiny",
        synthetic.uri,
        checkpoint={"keep": 5},
        evaluation={"correlation_baseline": True},
    )
    return config, run(config, callbacks=[receiver])


def records(run_dir: str, kind: str) -> list[dict[str, Any]]:
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_the_loss_falls_and_recall_rises(tiny: Tiny) -> None:
    losses = [record["loss"] for record in records(tiny[0].run_dir, "epoch")]
    assert len(losses) == 3
    assert losses[2] < losses[0] - 0.1
    result = tiny[1]
    assert result.untrained is not None
    assert result.metrics["recall@10"] > result.untrained["recall@10"]
    assert result.metrics["queries"] == NUM_TEST


def test_the_mined_plan_differs_from_the_geographic_one_and_follows_its_own_graph(
    tiny: Tiny, synthetic: GeoDataset
) -> None:
    config = tiny[0]
    epochs = records(config.run_dir, "epoch")
    assert [e["graph"] for e in epochs] == ["geographic", "similarity v=0001", "similarity v=0002"]
    pairs = synthetic.pairs("train")
    for epoch, version in ((1, 0), (2, 1), (3, 2)):
        found = load_plan(f"{config.run_dir}/plans/epoch={epoch:04d}.parquet")[0]
        plans = {}
        for v in (0, version):
            graph = NeighborGraph.load(f"{config.run_dir}/neighbors/v={v:04d}")
            plan = plan_batches(
                pairs,
                graph,
                batch_size=16,
                num_hard_negatives=6,
                neighbor_pool_size=12,
                seed=3,
                epoch=epoch,
            )
            plans[v] = pairs.query_ids[plan.batches]
        assert np.array_equal(found, plans[version])
        assert epoch == 1 or not np.array_equal(found, plans[0])


def test_the_mined_graph_is_each_places_nearest_references_by_cosine(tiny: Tiny) -> None:
    folder = f"{tiny[0].run_dir}/embeddings/v=0002"
    graph = NeighborGraph.load(f"{tiny[0].run_dir}/neighbors/v=0002")
    q, r = read_embeddings(folder, "queries"), read_embeddings(folder, "references")
    q, r = q.take(np.arange(NUM_TRAIN)), r.take(np.arange(NUM_TRAIN))
    assert graph.scores is not None
    for row, place in enumerate(graph.place_ids.tolist()):
        query = q.vectors[q.place_ids == place][0].astype(np.float64)
        scores = {
            # the length of float16 vectors is nearly 1
            int(p): float(v @ query / np.linalg.norm(v) / np.linalg.norm(query))
            for p, v in zip(r.place_ids, r.vectors, strict=True)
            if p != place
        }
        wanted = sorted(scores.values(), reverse=True)[:12]
        np.testing.assert_allclose(graph.scores[row], wanted, atol=1e-5)
        np.testing.assert_allclose(
            [scores[n] for n in graph.neighbors[row].tolist()], wanted, atol=1e-5
        )


def test_embeddings_are_those_of_the_checkpoint_and_carry_their_stamp(
    tiny: Tiny, synthetic: GeoDataset
) -> None:
    config, folder = tiny[0], f"{tiny[0].run_dir}/embeddings/v=0003"
    encoder = load_encoder(config.model, f"{config.run_dir}/checkpoints/epoch=0003").eval()
    stamp = checkpoint_stamp(
        config, encoder, f"{config.run_dir}/checkpoints/epoch=0003", synthetic.fingerprint
    )
    table = synthetic.table("queries", ["test"])
    found = read_embeddings(folder, "queries", stamp=stamp)
    assert sorted(found.ids.tolist()) == table.ids.tolist()
    images = torch.stack([load_raw(table, int(row)) for row in table.rows(found.ids)])
    with torch.inference_mode():
        wanted = torch.nn.functional.normalize(encoder.embed(images, "queries"), dim=1).numpy()
    np.testing.assert_allclose(found.vectors, wanted, atol=5e-4)  # of float16
    older = checkpoint_stamp(
        config, encoder, f"{config.run_dir}/checkpoints/epoch=0002", synthetic.fingerprint
    )
    with pytest.raises(RunError, match=r"made with step .* is wanted"):
        read_embeddings(folder, "queries", stamp=older)


def test_metrics_hold_what_a_reader_looks_for(tiny: Tiny) -> None:
    epoch = records(tiny[0].run_dir, "epoch")[-1]
    names = (
        "loss learning_rate temperature pairs_per_s hardness pairs_left_out load_s step_s plan_s"
    )
    assert all(np.isfinite(epoch[name]) for name in names.split())
    assert 0 <= epoch["learning_rate"] < tiny[0].train.learning_rate
    assert epoch["pairs_left_out"] == NUM_TRAIN - 16 * (NUM_TRAIN // 16)
    rounds = records(tiny[0].run_dir, "round")
    assert [r["epoch"] for r in rounds] == [0, 1, 2, 3]
    assert {"embed_s", "mine_s"} <= rounds[1].keys()
    assert {"embed_s", "evaluate_s"} <= rounds[3].keys()
    assert len(records(tiny[0].run_dir, "baseline")) == 1
    assert not (Path(tiny[0].run_dir) / ".ray_train").exists()


def test_the_report_is_one_self_contained_file(tiny: Tiny) -> None:
    page = (Path(tiny[0].run_dir) / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") > 30
    assert page.count("<svg") == 3
    assert "learning_rate: 0.001" in page
    assert "Mined hard negatives" in page
    assert "gradient correlation" in page
    for outside in ("<script src", "<link", 'src="http', "url(http"):
        assert outside not in page
    shown: list[Example] = []
    assert write_report(tiny[0].run_dir, show=shown.extend).endswith("report.html")
    assert all(example.title in page for example in shown)
    assert len(shown) > 1


def test_callbacks_receive_each_line_of_metrics_jsonl_as_a_typed_record(
    tiny: Tiny, receiver: Receiver
) -> None:
    lines = (Path(tiny[0].run_dir) / "metrics.jsonl").read_text().splitlines()
    assert [dict(record.values) for record in receiver.records] == [*map(json.loads, lines)]
    assert all(type(record) is not RunRecord for record in receiver.records)


def test_an_error_of_a_callback_ends_the_run_as_it_is_and_is_no_failed_round(
    synthetic: GeoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is raised in the thread of the rounds, which tries again after an OSError of its own."""

    class Failing(Receiver):
        def on_record(self, record: RunRecord) -> None:
            super().on_record(record)
            if isinstance(record, EmbeddingRecord):
                raise OSError("the user's disk is full")

    tools = Tools(monkeypatch)
    config = tiny_config(tmp_path / "run", synthetic.uri, train=ONE_WORKER)
    failing = Failing()
    with pytest.raises(OSError, match="the user's disk is full"):
        run(config.model_copy(update={"loggers": ("wandb", "mlflow")}), callbacks=[failing])
    assert isinstance(failing.records[-1], EmbeddingRecord)
    assert records(config.run_dir, "round_failed") == []
    (wandb_run,) = tools.wandb.runs.values()
    (mlflow_run,) = tools.mlflow.runs.values()
    assert any("embedding/images" in row for row in wandb_run.rows)
    assert wandb_run.exit_code == 1
    assert mlflow_run.status == "KILLED"


def test_an_existing_run_is_refused_without_resume_and_left_alone(tiny: Tiny) -> None:
    before = (Path(tiny[0].run_dir) / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="holds a run already; continue it with --resume"):
        run(tiny[0])
    changed = tiny[0].model_copy(
        update={"train": tiny[0].train.model_copy(update={"learning_rate": 0.5})}
    )
    with pytest.raises(InputError, match=r"other values \(train\.learning_rate: 0\.001 -> 0\.5\)"):
        run(changed, resume=True)
    assert run(tiny[0], resume=True).metrics == tiny[1].metrics
    assert (Path(tiny[0].run_dir) / "metrics.jsonl").read_bytes() == before


def move_dataset(config: RunConfig, folder: Path) -> RunConfig:
    """Copy the data set to one folder and its images to another; return where they are now."""
    shutil.copytree(config.data.uri, folder / "data")
    (folder / "photos").mkdir()
    (folder / "data/images").rename(folder / "photos/images")
    places = {"uri": str(folder / "data"), "images_root": str(folder / "photos")}
    return config.model_copy(update={"data": config.data.model_copy(update=places)})


def test_a_run_resumed_after_epoch_1_ends_with_the_same_weights(tiny: Tiny, tmp_path: Path) -> None:
    """An interruption in epoch 2 leaves a finished first round and an unpublished checkpoint.

    The data set and its images were moved meanwhile.
    """
    whole, part = Path(tiny[0].run_dir), tmp_path / "part"
    shutil.copytree(whole, part)
    for name in (
        "checkpoints/epoch=0003",
        "embeddings/v=0002",
        "embeddings/v=0003",
        "neighbors/v=0002",
    ):
        shutil.rmtree(part / name)
    (part / "checkpoints/epoch=0002/_MANIFEST.json").unlink()
    info = json.loads((part / "run.json").read_text())
    files.write_json(str(part / "run.json"), {**info, "status": "running"})
    moved = move_dataset(tiny[0], tmp_path / "moved")
    result = run(moved.model_copy(update={"run_dir": str(part)}), resume=True)
    assert json.loads((part / "run.json").read_text())["dataset"]["uri"] == moved.data.uri
    ours, theirs = (folder / "checkpoints/epoch=0003" for folder in (part, whole))
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    states = [
        torch.load(folder / "training_state.pt", weights_only=True) for folder in (ours, theirs)
    ]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert result.metrics == tiny[1].metrics
    for kind in ("epoch", "step", "evaluation", "mining"):
        logged = [
            [(r["epoch"], r.get("loss")) for r in records(str(folder), kind)]
            for folder in (part, whole)
        ]
        assert logged[0] == logged[1]


def test_a_branch_whose_values_compute_the_same_ends_with_the_same_weights_and_says_so(
    tiny: Tiny, tmp_path: Path
) -> None:
    """The oracle of a branch is the line that it leaves, which is kept."""
    part = tmp_path / "part"
    shutil.copytree(tiny[0].run_dir, part)
    evaluation = tiny[0].evaluation.model_copy(update={"best_metric": "recall@5"})
    config = tiny[0].model_copy(update={"run_dir": str(part), "evaluation": evaluation})
    result = run(config, resume=True, from_epoch=2)
    ours, theirs = (folder / "checkpoints/epoch=0003" for folder in (part, part / "branches/0001"))
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    states = [Checkpoint.read(str(folder)).training_state() for folder in (ours, theirs)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert result.metrics == tiny[1].metrics
    assert result.finished
    (branch,) = records(str(part), "branch")
    assert branch["changed"] == {"evaluation.best_metric": ["recall@1", "recall@5"]}
    assert [record["epoch"] for record in records(str(part), "epoch")] == [1, 2, 3]
    said = "branch from epoch 2: evaluation.best_metric recall@1 -&gt; recall@5"
    assert said in (part / "report.html").read_text()


@pytest.fixture
def damaged(tmp_path: Path) -> GeoDataset:
    """The synthetic data set with a corrupt query and a missing reference in each split."""
    dataset = write_synthetic(tmp_path / "damaged")
    (tmp_path / "damaged/images/queries/5.png").write_bytes(b"\x89PNG nothing")
    (tmp_path / f"damaged/images/queries/{NUM_TRAIN}.png").write_bytes(b"")
    for place in (9, NUM_TRAIN + 1):
        (tmp_path / f"damaged/images/references/{place}.png").unlink()
    return dataset


def test_corrupt_images_are_skipped_counted_and_listed(
    ray_cluster: None, damaged: GeoDataset, tmp_path: Path
) -> None:
    config = tiny_config(
        tmp_path / "run",
        damaged.uri,
        data={"on_bad_image": "skip"},
        train={"epochs": 2},
        sampling={"neighbor_pool_size": NUM_TRAIN - 1},
    )
    result = run(config)
    listed = [
        json.loads(line)["reason"]
        for line in (tmp_path / "run/bad_images.jsonl").read_text().splitlines()
    ]
    assert {reason.split(",")[0] for reason in listed} == {
        f"id {i}" for i in (5, 9, NUM_TRAIN, NUM_TRAIN + 1)
    }
    assert len(listed) == 4
    assert "the file is empty" in " ".join(listed)
    assert "FileNotFoundError" in " ".join(listed)
    assert result.metrics["queries"] == NUM_TEST - 2
    assert result.metrics["queries_without_reference"] == 1
    for epoch in records(config.run_dir, "epoch"):
        plan = load_plan(f"{config.run_dir}/plans/epoch={epoch['epoch']:04d}.parquet")[0]
        assert epoch["pairs_masked"] == int(np.isin(plan, [5, 9]).sum())
    graph = NeighborGraph.load(f"{config.run_dir}/neighbors/v=0001")
    assert 1005 not in graph.place_ids
    assert 1009 not in graph.neighbors


def test_a_corrupt_image_stops_embedding_and_training_by_name(
    ray_cluster: None, damaged: GeoDataset, tmp_path: Path
) -> None:
    with pytest.raises(
        BadImageError, match=rf"queries/{NUM_TRAIN}\.png: the file is empty; mend|references/"
    ):
        run(tiny_config(tmp_path / "a", damaged.uri, train=ONE_WORKER))
    with pytest.raises(BadImageError, match=r"id 5, .*queries/5\.png|id 9, .*references/9\.png"):
        run(
            tiny_config(
                tmp_path / "b", damaged.uri, train=ONE_WORKER, evaluation={"before_training": False}
            )
        )


def test_steps_without_finite_gradients_are_skipped_and_stop_the_run_when_they_do_not_end(
    ray_cluster: None, synthetic: GeoDataset, tmp_path: Path
) -> None:
    """The first step makes the weights so large that no later one has a finite loss."""
    config = tiny_config(
        tmp_path / "run",
        synthetic.uri,
        train={"learning_rate": 1e30, "warmup_epochs": 0, "max_skipped_steps": 3, **ONE_WORKER},
        evaluation={"before_training": False},
    )
    message = (
        r"the gradients of 3 steps in a row are not finite \(train\.max_skipped_steps=3\), the"
        r" last of them at step 4 \(epoch 1, batch 3 of its plan\); non-finite embeddings for query"
    )
    with pytest.raises(RunError, match=message):
        run(config)
    skipped = [record for record in read_records(config.run_dir) if record["kind"] == "skipped"]
    assert [record["step"] for record in skipped] == [2, 3, 4]
    assert not Path(config.run_dir, "checkpoints/epoch=0001").exists()


def test_embeddings_that_are_not_finite_stop_the_job_with_the_image(
    tiny: Tiny, synthetic: GeoDataset, tmp_path: Path
) -> None:
    config = tiny[0]
    encoder = load_encoder(config.model, f"{config.run_dir}/checkpoints/epoch=0001")
    with torch.no_grad():
        next(encoder.model.parameters()).fill_(1e38)  # finite, or no checkpoint would hold it
    checkpoint = str(tmp_path / "nan")
    save_checkpoint(checkpoint, encoder, None, epoch=1, step=1)
    stamp, target = (
        checkpoint_stamp(config, encoder, checkpoint, synthetic.fingerprint),
        str(tmp_path / "e"),
    )
    with (
        EncoderPool(config.model, config.placed_embedding, config.ray.start_timeout_s) as pool,
        pytest.raises(
            RunError, match=r"the embedding of (queries|references) id \d+ is not finite"
        ),
    ):
        embed(
            pool,
            config,
            synthetic,
            checkpoint,
            target,
            splits=["test"],
            numerics=Numerics(),
            stamp=stamp,
        )
    assert not is_published(target)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"batch_size": 200}}, "train.batch_size=200 exceeds the 96 places with pairs"),
        (
            {"sampling": {"neighbor_pool_size": 96}},
            "neighbor_pool_size=96 is too large for the 96 places",
        ),
        ({"data": {"uri": "/no/such/data"}}, "no data set at /no/such/data"),
        ({"data": {"test_split": "val"}}, "test_split='val' holds no query"),
        ({"model": {"name": "test_convnet"}}, "model.name='test_convnet'"),
        ({"model": {"pretrained": "/no/weights.pth"}}, "/no/weights.pth"),
        (
            {"model": {"name": "poolformer_s12"}, "train": {"layer_decay": 0.8}},
            "timm does not tell the stages of MetaFormer",
        ),
        ({"train": {"cpus_per_worker": 3.0}}, r"6\.25 CPUs are needed .* the cluster has 4; lower"),
        ({"train": {"use_gpu": True}}, "1.9 GPUs are needed"),
        ({"mining": {"index_memory_gb": 1e-6}}, r"mining\.index_memory_gb"),
        ({"mining": {"num_shards": 97}}, "num_shards=97 exceeds the 96 references"),
    ],
)
def test_what_a_data_set_cannot_give_is_refused_before_anything_is_written(
    ray_cluster: None, synthetic: GeoDataset, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(tiny_config(tmp_path / "run", synthetic.uri, **sections))
    assert not (tmp_path / "run").exists()


def test_a_radius_that_leaves_no_batch_is_refused_by_name(
    synthetic: GeoDataset, tmp_path: Path
) -> None:
    def plan(radius: float) -> str:
        config = tiny_config(
            tmp_path / f"r{radius}", synthetic.uri, sampling={"exclude_radius_m": radius}
        )
        folder = RunFolder.open(config, synthetic, resume=False)
        split = TrainSplit.read(config, synthetic)
        graphs = RunGraphs.from_config(config, split, synthetic.fingerprint, folder)
        planner = Planner(graphs, seed=config.seed, protocol=config.protocol)
        planner.plan_epoch(1, 0, due=0)
        return planner.plan_uri(1)

    with pytest.raises(
        InputError,
        match=r"no batch of 16 places .* up to 95 others; lower sampling\.exclude_radius_m",
    ):
        plan(2.1e7)
    assert plan(0.0).endswith("epoch=0001.parquet")


def test_a_folder_that_holds_other_things_is_not_written_into(
    synthetic: GeoDataset, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and holds no run"):
        run(tiny_config(tmp_path, synthetic.uri))


def test_gradient_correlation_is_pearsons(synthetic: GeoDataset) -> None:
    table = open_dataset(synthetic.uri).table("references", ["test"])
    images = torch.stack([load_raw(table, row) for row in range(2)])
    a, b = gradient_correlation_embeddings(images).astype(np.float64)
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert cosine == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-6)
    gy, gx = np.gradient(images[0].float().mean(0).numpy())
    assert (
        np.corrcoef(
            np.hypot(gx, gy)[1:-1, 1:-1].ravel(), a.reshape(SIZE, SIZE)[1:-1, 1:-1].ravel()
        )[0, 1]
        > 0.9
    )
