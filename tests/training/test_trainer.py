"""Shares and metrics of ranks, the mailbox, and an epoch trained by two workers."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray
import torch

from s4g_ray.config.schema import RunConfig
from s4g_ray.config.training_schema import TrainConfig
from s4g_ray.data.dataset import GeoDataset, write_dataset
from s4g_ray.data.pair_loader import PairLoader
from s4g_ray.data.train_split import TrainSplit
from s4g_ray.encoder.checkpoint import epoch_uri, save_checkpoint
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.errors import WriteError
from s4g_ray.freed_memory import VARIABLES
from s4g_ray.sampling.gallery_negatives import choose_gallery
from s4g_ray.sampling.sampler import plan_batches
from s4g_ray.storage import files
from s4g_ray.training.checkpoint_writer import CheckpointWriter
from s4g_ray.training.loss import symmetric_info_nce
from s4g_ray.training.mailbox import Mailbox, Message
from s4g_ray.training.metrics.epoch_totals import EpochTotals
from s4g_ray.training.optimizer import learning_rate
from s4g_ray.training.trainer import Training, make_trainer, worker_variables
from s4g_ray.training.worker import RankTraining
from s4g_ray.training.worker_group import DRAINED, GroupEvents
from tests.conftest import NUM_TEST, NUM_TRAIN, tiny_config

CORRUPT = NUM_TRAIN + 3  # a reference id


def test_an_epochs_metrics_are_sums_over_its_steps() -> None:
    totals = EpochTotals(
        batches=4, loss=8.0, finite=4, masked=3, skipped=1, load_s=1.0, seconds=5.0, wait_s=15.0
    )
    record = totals.record(16, has_gallery=False)
    assert (record["loss"], record["pairs_per_s"], record["step_s"]) == (2.0, 12.8, 4.0)
    assert (record["load_wait"], record["wait_share"]) == (0.2, 0.75)
    assert "gallery_masked" not in record
    assert EpochTotals().record(16, has_gallery=True)["pairs_per_s"] == 0.0


def test_ranks_wait_for_their_plan_and_all_get_the_same() -> None:
    async def scene() -> None:
        mailbox = Mailbox()
        ranks = [asyncio.create_task(mailbox.wait_for_plan(3)) for _ in range(3)]
        await mailbox.put_plan(2, "other")
        await asyncio.sleep(0.01)
        assert not any(rank.done() for rank in ranks)
        await mailbox.put_plan(3, "plan")
        assert await asyncio.gather(*ranks) == ["plan"] * 3

    asyncio.run(scene())


def test_a_stop_ends_the_wait_of_ranks_and_messages_keep_their_order() -> None:
    async def scene() -> None:
        mailbox = Mailbox()
        rank = asyncio.create_task(mailbox.wait_for_plan(1))
        await asyncio.sleep(0)
        stop = asyncio.create_task(mailbox.wait_for_stop())
        await asyncio.sleep(0)
        assert not stop.done()
        assert not await mailbox.is_stopped()
        await mailbox.stop("save")
        await mailbox.stop()
        assert await rank is None
        assert await stop == "save"
        assert await mailbox.is_stopped()
        await mailbox.put_plan(2, "too late")
        assert await mailbox.wait_for_plan(2) is None
        assert await mailbox.take(0.01) == []
        waiting = asyncio.create_task(mailbox.take(5))
        await mailbox.post({"n": 1})
        assert await waiting == [{"n": 1}]
        for n in range(3):
            await mailbox.post({"n": n})
        assert [m["n"] for m in await mailbox.take(1)] == [0, 1, 2]

    asyncio.run(scene())


def test_ranks_on_a_drained_node_save_and_end_and_the_next_group_goes_on() -> None:
    async def scene() -> None:
        mailbox = Mailbox()
        await mailbox.put_plan(1, "first")
        assert await mailbox.wait_for_plan(1) == "first"
        waiting = asyncio.create_task(mailbox.wait_for_plan(2))
        stop = asyncio.create_task(mailbox.wait_for_stop())
        await asyncio.sleep(0)
        assert not await mailbox.must_move()
        await mailbox.move()
        assert await stop == "save"
        assert await waiting is None
        assert await mailbox.must_move()
        await mailbox.put_plan(2, "second")
        assert await mailbox.wait_for_plan(2) is None  # the same for all ranks of the group
        assert await mailbox.wait_for_plan(1) == "first"

        await mailbox.start_group()
        assert not await mailbox.must_move()
        assert await mailbox.wait_for_plan(2) == "second"
        stop = asyncio.create_task(mailbox.wait_for_stop())
        await asyncio.sleep(0.01)
        assert not stop.done()
        await mailbox.move()
        await mailbox.stop()  # the driver ends the run: no other group
        assert await stop in ("save", "stop")
        assert not await mailbox.must_move()
        await mailbox.start_group()
        assert await mailbox.wait_for_stop() == "stop"

    asyncio.run(scene())


@dataclass
class Status:
    """The answers of Ray Train's status of a group."""

    errors: dict[int, Exception] = field(default_factory=dict)
    notice: Any = None

    def get_preemption_info(self) -> Any:
        return self.notice


class Recorder:
    """A stand-in for a handle of a mailbox or gate: records the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self.calls.append((name, *arguments)))


def test_a_groups_loss_is_posted_once_and_a_drained_node_moves_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("s4g_ray.training.worker_group.ray.get", lambda answer: answer)
    mailbox = Recorder()
    gate = Recorder()
    events = GroupEvents(mailbox, gate)
    notice = SimpleNamespace(preempted_ranks=[1])
    events.before_worker_group_start(None)
    events.after_worker_group_poll_status(Status())
    assert events.before_init_train_context([]) == {}
    assert gate.calls == [("close",), ("open",)]
    for status in (Status(notice=notice), Status({1: ValueError("left")}, notice)):
        events.after_worker_group_poll_status(status)
    drained = {"kind": "lost", "ranks": [1], "reason": DRAINED}
    assert mailbox.calls == [("start_group",), ("move",), ("post", drained)]

    events.before_worker_group_start(None)
    mailbox.calls.clear()
    errors: dict[int, Exception] = {2: RuntimeError("died"), 0: RuntimeError("broken. pipe")}
    events.after_worker_group_poll_status(Status(errors))
    events.after_worker_group_poll_status(Status(errors))
    lost = {"kind": "lost", "ranks": [0, 2], "reason": "broken"}
    assert mailbox.calls == [("post", lost)]


def test_workers_get_configured_variables_and_nccls_warnings_or_those_of_memory(
    malloc_not_chosen: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("NCCL_DEBUG", raising=False)
    assert worker_variables(TrainConfig()) == VARIABLES
    chosen = {"MALLOC_ARENA_MAX": "8"}
    assert worker_variables(TrainConfig(env=chosen)) == {**VARIABLES, **chosen}
    on_gpus = TrainConfig(use_gpu=True, env={"NCCL_SOCKET_IFNAME": "eth0"})
    assert worker_variables(on_gpus) == {"NCCL_DEBUG": "WARN", "NCCL_SOCKET_IFNAME": "eth0"}
    assert worker_variables(TrainConfig(use_gpu=True, env={"NCCL_DEBUG": "INFO"})) == {
        "NCCL_DEBUG": "INFO"
    }
    monkeypatch.setenv("NCCL_DEBUG", "TRACE")
    assert worker_variables(TrainConfig(use_gpu=True)) == {"NCCL_DEBUG": "TRACE"}
    config = tiny_config(
        tmp_path,
        "d",
        train={"use_gpu": True, "env": {"A": "b"}, "collective_timeout_s": 90.5},
    )
    trainer: Any = make_trainer(config, Numerics(), GroupEvents(None), str(tmp_path))
    assert trainer.run_config.worker_runtime_env["env_vars"]["A"] == "b"
    assert trainer.backend_config.backend == "nccl"
    assert trainer.backend_config.timeout_s == 91
    assert trainer.scaling_config.placement_strategy == "PACK"
    assert trainer.run_config.failure_config.max_preemption_failures == -1  # they do not count


def test_close_ends_the_controller_of_workers_that_do_not_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitting = threading.Event()
    killed: list[Any] = []

    def kill(actor: Any) -> None:
        killed.append(actor)
        if actor == "controller":
            fitting.set()

    monkeypatch.setattr(ray, "kill", kill)
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    training: Any = object.__new__(Training)
    training.mailbox = SimpleNamespace(
        stop=SimpleNamespace(remote=lambda _: None),
        get_controller=SimpleNamespace(remote=lambda: "controller"),
    )
    training._scratch = str(tmp_path / "scratch")
    training._thread = threading.Thread(target=fitting.wait, args=(60,), daemon=True)
    training._thread.start()
    training.close(0.01)
    assert not training._thread.is_alive()
    assert killed == ["controller", training.mailbox]


def set_column(table: pa.Table, name: str, values: list[str]) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values))


def with_absolute_uris(table: pa.Table, folder: str) -> pa.Table:
    return set_column(table, "uri", [files.join(folder, uri) for uri in table["uri"].to_pylist()])


def with_gallery(synthetic: GeoDataset, folder: Path) -> GeoDataset:
    """Write the train pairs of the synthetic data set, with its test references as gallery.

    One of the gallery's images is corrupt.
    """
    references = with_absolute_uris(synthetic.references.to_table(), synthetic.uri).sort_by("id")
    queries = with_absolute_uris(synthetic.queries.to_table(), synthetic.uri)
    queries = queries.filter(pc.field("split") == "train")
    (folder / "broken.png").write_bytes(b"\x89PNG nothing")
    uris = references["uri"].to_pylist()
    uris[CORRUPT] = str(folder / "broken.png")
    splits = ["train"] * NUM_TRAIN + ["gallery"] * NUM_TEST
    references = set_column(references, "uri", uris)
    references = set_column(references, "split", splits)
    return write_dataset(str(folder / "data"), references, queries, name="with gallery")


@pytest.mark.cluster
def test_two_workers_train_on_gallery_negatives_as_one_process_would(
    ray_cluster: None, synthetic: GeoDataset, tmp_path: Path
) -> None:
    dataset = with_gallery(synthetic, tmp_path)
    config = tiny_config(
        tmp_path / "run",
        dataset.uri,
        data={"on_bad_image": "skip"},
        train={"epochs": 1},
        sampling={"gallery_negatives": 8, "gallery_splits": ["gallery"]},
    ).model_copy(update={"protocol": "paper"})
    split = TrainSplit.read(config, dataset)
    pairs = split.pairs
    references = split.gallery
    assert references is not None
    plan = plan_batches(pairs, None, batch_size=16, seed=3, epoch=1)
    gallery, _ = choose_gallery(
        pairs.place_ids[plan.batches], None, references, num=8, seed=3, epoch=1
    )
    gallery[0, 1] = CORRUPT
    gallery[0, 6] = -1
    gallery[2, 3] = CORRUPT
    replace(plan, gallery=gallery).save(f"{config.run_dir}/plan.parquet", pairs)
    encoder = Encoder.build(config.model, seed=3)
    save_checkpoint(epoch_uri(config.run_dir, 0), encoder, None, epoch=0, step=0)
    messages = train_one_epoch(config, f"{config.run_dir}/plan.parquet")

    loader = PairLoader(
        dataset.table("queries", ["train"]),
        dataset.table("references", ["train", "gallery"]),
        config.data,
        config.augmentation,
        seed=3,
    )
    query_ids = pairs.query_ids[plan.batches]
    reference_ids = pairs.reference_ids[plan.batches]
    batch = next(loader.load(query_ids, reference_ids, epoch=1, gallery_ids=gallery))
    assert batch.gallery is not None
    with torch.no_grad():
        q, r, scale = encoder(batch.queries, torch.cat([batch.references, batch.gallery]))
        extras = {"extra_references": r[16:], "extra_valid": batch.gallery_valid}
        wanted = symmetric_info_nce(q, r[:16], scale, label_smoothing=0.1, **extras).item()
        without = symmetric_info_nce(q, r[:16], scale, label_smoothing=0.1).item()
    steps = [m for m in messages if m["kind"] == "step"]
    assert steps[0]["loss"] == pytest.approx(wanted, rel=1e-5)
    assert abs(wanted - without) > 1e-2
    batches = -(-len(pairs) // 16)  # the published schedule counts pairs that are left out too
    rates = [learning_rate(config.train, step / batches) for step in range(6)]
    assert [step["learning_rate"] for step in steps] == pytest.approx(rates)
    (epoch,) = [m for m in messages if m["kind"] == "epoch"]
    assert (len(steps), epoch["pairs_masked"]) == (6, 0)
    assert epoch["gallery_masked"] == (gallery == CORRUPT).sum() >= 2
    assert epoch["pairs_per_s"] * (epoch["load_s"] + epoch["step_s"]) == pytest.approx(96)
    reasons = [reason for m in messages if m["kind"] == "bad_images" for reason in m["reasons"]]
    assert len(reasons) == epoch["gallery_masked"]
    assert all(f"id {CORRUPT}, " in reason and "broken.png" in reason for reason in reasons)


def train_one_epoch(config: RunConfig, plan: str) -> list[Message]:
    """Train the first epoch on a plan; return the messages of the workers."""
    training = Training(config, Numerics())
    try:
        training.post_plan(1, plan)
        messages: list[Message] = []
        while not any(message["kind"] == "epoch" for message in messages):
            messages += training.take()
    finally:
        training.close()
    return messages


@pytest.mark.cluster
def test_a_worker_that_waits_for_a_plan_learns_that_its_checkpoint_failed(
    ray_cluster: None,
) -> None:
    """The driver may wait for this checkpoint before it plans: both would wait for ever."""

    def fail(_: object) -> None:
        raise WriteError("the disk is full")

    mailbox: Any = ray.remote(Mailbox).options(num_cpus=0).remote()
    with CheckpointWriter() as writer:
        rank: Any = SimpleNamespace(mailbox=mailbox, writer=writer)
        writer.submit({}, fail)
        with pytest.raises(WriteError, match="the disk is full"):
            RankTraining.wait_for_plan(rank, 2)
        writer.submit({}, lambda _: None)
        ray.get(mailbox.put_plan.remote(2, "plan"))
        assert RankTraining.wait_for_plan(rank, 2) == "plan"
    ray.kill(mailbox)
