from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from s4g_ray.config import AugmentConfig, ModelConfig, TrainConfig
from s4g_ray.dataset import GeoDataset
from s4g_ray.encoder import Encoder, Numerics, encode_weights
from s4g_ray.images import PairLoader
from s4g_ray.trainer import Mailbox, _train_step, _Worker, learning_rate, rank_slots
from tests.conftest import tiny_config


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


@pytest.mark.parametrize(("init_scale", "skipped"), [(2.0**10, 0), (2.0**40, 1)])
def test_a_step_whose_scaled_gradients_overflow_is_left_out_counted_and_lowers_the_scale(
    synthetic: GeoDataset, init_scale: float, skipped: int
) -> None:
    config = tiny_config("x", synthetic.uri)
    encoder = Encoder.build(ModelConfig(name="test_convnext", pretrained=False)).train()
    tables = synthetic.table("queries", ["train"]), synthetic.table("references", ["train"])
    loader = PairLoader(*tables, config.data, AugmentConfig(), seed=0)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    worker = _Worker(
        config, Numerics("fp16"), None, encoder, encoder, optimizer, scaler, loader, torch.device("cpu"), 1, 0
    )
    before = encode_weights(encoder)
    ids = np.arange(8).reshape(1, 8)
    (batch,) = loader.load(ids, ids, epoch=1)
    assert np.isfinite(_train_step(worker, batch))
    assert worker.steps_skipped == skipped
    assert (encode_weights(encoder) == before) == bool(skipped)
    assert (scaler.get_scale() < init_scale) == bool(skipped)
