from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from s4g_ray import storage
from s4g_ray.config import AugmentConfig, ModelConfig, RunConfig, TrainConfig
from s4g_ray.dataset import GeoDataset, write_dataset
from s4g_ray.encoder import Encoder, Numerics, encode_weights
from s4g_ray.gallery import choose_gallery, gallery_references
from s4g_ray.images import PairLoader
from s4g_ray.loss import symmetric_info_nce
from s4g_ray.mailbox import Mailbox, Message
from s4g_ray.sampler import plan_batches
from s4g_ray.trainer import (
    Training,
    _describe_non_finite,
    _train_step,
    _Worker,
    learning_rate,
    rank_slots,
    save_checkpoint,
)
from tests.conftest import NUM_TEST, NUM_TRAIN, tiny_config

CORRUPT = NUM_TRAIN + 3  # a reference id


def test_the_learning_rate_warms_up_linearly_and_ends_at_zero_along_a_cosine() -> None:
    cfg = TrainConfig(epochs=11, warmup_epochs=1, learning_rate=0.2)
    assert learning_rate(cfg, 0.5) == pytest.approx(0.1)
    assert learning_rate(cfg, 1.0) == pytest.approx(0.2)
    assert learning_rate(cfg, 6.0) == pytest.approx(0.1)
    assert learning_rate(cfg, 11.0) == pytest.approx(0.0, abs=1e-12)
    rates = [learning_rate(cfg, 1 + i / 10) for i in range(101)]
    assert rates == sorted(rates, reverse=True)
    no_warmup = TrainConfig(epochs=2, warmup_epochs=0, learning_rate=0.2)
    assert learning_rate(no_warmup, 0.0) == 0.2


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_the_ranks_together_take_each_slot_of_the_plan_once_and_in_order(num_workers: int) -> None:
    slots = np.arange(24).reshape(3, 8)
    shares = [slots[:, rank_slots(8, num_workers, rank)] for rank in range(num_workers)]
    assert np.array_equal(np.concatenate(shares, axis=1), slots)


def test_ranks_wait_for_their_plan_and_all_get_the_same() -> None:
    async def scene() -> None:
        mailbox = Mailbox()
        ranks = [asyncio.create_task(mailbox.plan(3)) for _ in range(3)]
        await mailbox.put_plan(2, "other")
        await asyncio.sleep(0.01)
        assert not any(rank.done() for rank in ranks)
        await mailbox.put_plan(3, "plan")
        assert await asyncio.gather(*ranks) == ["plan"] * 3

    asyncio.run(scene())


def test_stopping_sends_waiting_ranks_home_and_messages_keep_their_order() -> None:
    async def scene() -> None:
        mailbox = Mailbox()
        rank = asyncio.create_task(mailbox.plan(1))
        await asyncio.sleep(0)
        await mailbox.stop()
        assert await rank is None
        assert await mailbox.take(0.01) == []
        waiting = asyncio.create_task(mailbox.take(5))
        await mailbox.post({"n": 1})
        assert await waiting == [{"n": 1}]
        for n in range(3):
            await mailbox.post({"n": n})
        assert [m["n"] for m in await mailbox.take(1)] == [0, 1, 2]

    asyncio.run(scene())


def worker_of(dataset: GeoDataset, init_scale: float = 2.0**10) -> _Worker:
    """A rank in fp16, alone."""
    config = tiny_config("x", dataset.uri)
    encoder = Encoder.build(ModelConfig(name="test_convnext", pretrained=False)).train()
    tables = dataset.table("queries", ["train"]), dataset.table("references", ["train"])
    loader = PairLoader(*tables, config.data, AugmentConfig(), seed=0)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    return _Worker(
        config, Numerics("fp16"), None, encoder, encoder, optimizer, scaler, loader, torch.device("cpu"), 1, 0
    )


@pytest.mark.parametrize(("init_scale", "skipped"), [(2.0**10, 0), (2.0**40, 1)])
def test_a_step_whose_scaled_gradients_overflow_is_left_out_counted_and_lowers_the_scale(
    synthetic: GeoDataset, init_scale: float, skipped: int
) -> None:
    worker = worker_of(synthetic, init_scale)
    before = encode_weights(worker.encoder)
    ids = np.arange(8).reshape(1, 8)
    (batch,) = worker.loader.load(ids, ids, epoch=1)
    assert np.isfinite(_train_step(worker, batch))
    assert worker.steps_skipped == skipped
    assert (encode_weights(worker.encoder) == before) == bool(skipped)
    assert (worker.scaler.get_scale() < init_scale) == bool(skipped)


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([1, 5, 6], "non-finite embeddings for query ids [31, 32]; start"),
        ([2, 8], "non-finite embeddings for query ids [32] and gallery reference ids [70]; start"),
        ([9], "non-finite embeddings for gallery reference ids [71]; start"),
        ([], "of its plan); start"),
    ],
)
def test_embeddings_that_are_not_finite_are_named_by_query_and_by_gallery_reference(
    synthetic: GeoDataset, rows: list[int], named: str
) -> None:
    worker = worker_of(synthetic)
    pairs, gallery = np.array([[30, 31, 32, 33]]), np.array([[70, 71]])
    (batch,) = worker.loader.load(pairs, pairs, epoch=1, gallery_ids=gallery)
    embedded = torch.zeros(10, 5)
    embedded[rows, 3] = torch.nan
    assert named in _describe_non_finite(worker, batch, float("nan"), embedded)


def with_gallery(synthetic: GeoDataset, folder: Path) -> GeoDataset:
    """The train pairs of the synthetic data set; its test references are gallery, and one of them is corrupt."""
    tables = [source.to_table() for source in (synthetic.references, synthetic.queries)]
    made = []
    for table in tables:
        uris = [storage.join(synthetic.uri, uri) for uri in table["uri"].to_pylist()]
        made.append(table.set_column(table.column_names.index("uri"), "uri", pa.array(uris)))
    references, queries = made[0].sort_by("id"), made[1].filter(pc.field("split") == "train")
    (folder / "broken.png").write_bytes(b"\x89PNG nothing")
    uris = references["uri"].to_pylist()
    uris[CORRUPT] = str(folder / "broken.png")
    splits = ["train"] * NUM_TRAIN + ["gallery"] * NUM_TEST
    for name, values in (("uri", uris), ("split", splits)):
        references = references.set_column(references.column_names.index(name), name, pa.array(values))
    return write_dataset(str(folder / "data"), references, queries, name="with gallery")


@pytest.mark.cluster
def test_two_workers_train_on_gallery_negatives_as_one_process_would(
    ray_cluster: None, synthetic: GeoDataset, tmp_path: Path
) -> None:
    dataset = with_gallery(synthetic, tmp_path)
    config = tiny_config(
        tmp_path / "run", dataset.uri, data={"on_bad_image": "skip"}, train={"epochs": 1},
        sampling={"gallery_negatives": 8, "gallery_splits": ["gallery"]},
    )  # fmt: skip
    pairs, references = dataset.pairs("train"), gallery_references(config, dataset)
    plan = plan_batches(pairs, None, batch_size=16, seed=3, epoch=1)
    gallery, _ = choose_gallery(pairs.place_ids[plan.batches], None, references, num=8, seed=3, epoch=1)
    gallery[0, 1], gallery[0, 6], gallery[2, 3] = CORRUPT, -1, CORRUPT
    replace(plan, gallery=gallery).save(f"{config.run_dir}/plan.parquet", pairs)
    encoder = Encoder.build(config.model, seed=3)
    save_checkpoint(f"{config.run_dir}/first", encoder, None, epoch=0, step=0)
    messages = train_one_epoch(config, f"{config.run_dir}/first", f"{config.run_dir}/plan.parquet")

    tables = dataset.table("queries", ["train"]), dataset.table("references", ["train", "gallery"])
    loader = PairLoader(*tables, config.data, config.augment, seed=3)
    ids = pairs.query_ids[plan.batches], pairs.reference_ids[plan.batches]
    batch = next(loader.load(*ids, epoch=1, gallery_ids=gallery))
    assert batch.gallery is not None
    with torch.no_grad():
        q, r, scale = encoder(batch.queries, torch.cat([batch.references, batch.gallery]))
        extras = {"extra_references": r[16:], "extra_valid": batch.gallery_valid}
        wanted = symmetric_info_nce(q, r[:16], scale, label_smoothing=0.1, **extras).item()
        without = symmetric_info_nce(q, r[:16], scale, label_smoothing=0.1).item()
    steps = [m for m in messages if m["kind"] == "step"]
    assert steps[0]["loss"] == pytest.approx(wanted, rel=1e-5)
    assert abs(wanted - without) > 1e-2
    (epoch,) = [m for m in messages if m["kind"] == "epoch"]
    assert (len(steps), epoch["pairs_masked"]) == (6, 0)
    assert epoch["gallery_masked"] == (gallery == CORRUPT).sum() >= 2
    assert epoch["pairs_per_s"] * (epoch["load_s"] + epoch["step_s"]) == pytest.approx(96)
    reasons = [reason for m in messages if m["kind"] == "bad_images" for reason in m["reasons"]]
    assert len(reasons) == epoch["gallery_masked"]
    assert all(f"id {CORRUPT}, " in reason and "broken.png" in reason for reason in reasons)


def train_one_epoch(config: RunConfig, checkpoint: str, plan: str) -> list[Message]:
    training = Training(config, checkpoint, Numerics())
    try:
        training.post_plan(1, plan)
        messages: list[Message] = []
        for message in training.messages():
            messages.append(message)
            if message["kind"] == "epoch":
                break
    finally:
        training.close()
    return messages
