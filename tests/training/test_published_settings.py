"""The paper's configurations train as published: each setting against a plain restatement."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from s4g_ray.config.loading import load_config
from s4g_ray.config.training_schema import ModelConfig
from s4g_ray.data.pairs import PairTable
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.sampling.sampler import plan_batches
from s4g_ray.training.loss import symmetric_info_nce
from s4g_ray.training.optimizer import group_parameters, learning_rate
from s4g_ray.training.step import StepClock, TrainingStep
from tests.support.step_batches import CPU, encoder, make_batch, oracle

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = ["cvusa", "cvact", "vigor_same", "vigor_cross", "university1652"]

pytestmark = pytest.mark.usefixtures("one_thread")


def published_rates(
    num_pairs: int, batch_size: int, epochs: int, warmup_epochs: float, num_steps: int
) -> list[float]:
    """List the learning rates of the first steps: a rise from 0, then half a cosine.

    The length of an epoch is counted before its batches are composed: an incomplete batch counts.
    """
    batches = num_pairs // batch_size
    if num_pairs % batch_size:
        batches += 1
    warmup_steps = batches * warmup_epochs
    all_steps = batches * epochs
    rates = []
    for step in range(num_steps):
        if step < warmup_steps:
            share = step / warmup_steps
        else:
            done = (step - warmup_steps) / (all_steps - warmup_steps)
            share = 0.5 + 0.5 * math.cos(math.pi * done)
        rates.append(1e-3 * share)
    return rates


@pytest.mark.parametrize("name", NAMES)
def test_the_learning_rate_follows_the_published_schedule_batch_by_batch(
    name: str, tmp_path: Path
) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    places = np.arange(5000) % 2600  # some are left out: places with two pairs
    ids = np.arange(5000)
    plan = plan_batches(PairTable(ids, ids, places), None, batch_size=128, seed=1, epoch=1)
    plan.save(str(tmp_path / "plan.parquet"), PairTable(ids, ids, places))
    num_batches = len(plan.batches)
    assert num_batches < 5000 / 128
    clock = StepClock.from_plan(
        str(tmp_path / "plan.parquet"), is_published=config.protocol == "paper"
    )
    found: list[float] = []
    for epoch in range(config.train.epochs):
        for batch in range(num_batches):
            position = clock.position(epoch, batch, len(found))
            found.append(learning_rate(config.train, position))
    wanted = published_rates(5000, 128, config.train.epochs, config.train.warmup_epochs, len(found))
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-15)
    assert found[0] == 0
    warmup = {"university1652": 4}.get(name, 40)
    assert max(found) == found[warmup] == pytest.approx(1e-3)
    assert 0 < found[-1] < 1e-5


def test_the_strict_schedule_counts_the_batches_of_the_plan_from_their_middles(
    tmp_path: Path,
) -> None:
    ids = np.arange(20)
    pairs = PairTable(ids, ids, ids)
    plan = plan_batches(pairs, None, batch_size=8, seed=1, epoch=1)
    plan.save(str(tmp_path / "plan.parquet"), pairs)
    clock = StepClock.from_plan(str(tmp_path / "plan.parquet"), is_published=False)
    assert [clock.position(3, batch, 6 + batch) for batch in range(2)] == [3.25, 3.75]


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_acts_on_all_parameters(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    model = encoder()
    groups = group_parameters(model, config.train, decay_norms=config.decays_norms)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for parameter_name, parameter in model.named_parameters():
        assert decays[id(parameter)] == 0.01, parameter_name
    assert len(decays) == len(list(model.parameters()))


def test_a_step_clips_gradients_at_100_and_decays_all_weights() -> None:
    """AdamW's formulas, parameter by parameter, on gradients that are made large."""
    config = load_config(CONFIGS / "cvusa.yaml", ["train.epochs=2", "train.batch_size=8"])
    model = encoder()
    _, gradients = oracle(encoder(), make_batch())
    factor = 1000 / max(float(gradient.abs().max()) for gradient in gradients.values())
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: factor * gradient)  # type: ignore[no-untyped-call]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = TrainingStep(model, Numerics(), config.train, CPU, decay_norms=config.decays_norms)
    step.step(make_batch(), seed=1, position=0.5)
    rate = 0.5e-3
    num_clipped = 0
    for name, parameter in model.named_parameters():
        gradient = factor * gradients[name]
        num_clipped += int((gradient.abs() > 100).sum())
        clipped = gradient.clamp(-100, 100)
        # the first moment is 0.1 g, the second 0.001 g^2, both corrected for the first step
        wanted = before[name] * (1 - rate * 0.01) - rate * clipped / (clipped.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), wanted, rtol=0, atol=1e-9)
    assert num_clipped > 5


def loss_loop(queries: Tensor, references: Tensor) -> float:
    """Compute the loss of a batch pair by pair: temperature 1/0.07 at first, smoothing 0.1."""

    def cosine(a: list[float], b: list[float]) -> float:
        product = sum(x * y for x, y in zip(a, b, strict=True))
        return product / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    rows = queries.tolist(), references.tolist()
    count = len(rows[0])
    total = 0.0
    for side in (0, 1):
        for i in range(count):
            logits = [cosine(rows[side][i], rows[1 - side][j]) / 0.07 for j in range(count)]
            log_sum = math.log(sum(math.exp(logit) for logit in logits))
            for j in range(count):
                share = 0.1 / count + (0.9 if i == j else 0.0)
                total += share * (log_sum - logits[j])
    return total / (2 * count)


@pytest.mark.parametrize("name", ["cvusa", "university1652"])
def test_the_loss_has_the_published_temperature_and_label_smoothing(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    model = Encoder.build(
        ModelConfig(name="test_convnext", pretrained=False, temperature=config.model.temperature)
    )
    torch.manual_seed(0)
    queries, references = torch.randn(2, 6, 5, dtype=torch.float64)
    found = symmetric_info_nce(
        queries,
        references,
        model.logit_scale.detach().exp().double(),
        label_smoothing=config.train.label_smoothing,
    )
    assert found.item() == pytest.approx(loss_loop(queries, references), rel=1e-6)


@pytest.mark.parametrize("name", ["cvusa", "university1652"])
def test_fp16_gradients_are_scaled_by_1024_at_first(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.train.precision == "fp16"
    model = encoder(dtype=torch.float32)
    step = TrainingStep(model, Numerics(config.train.precision), config.train, CPU)
    assert step.scaler.get_scale() == 2**10
