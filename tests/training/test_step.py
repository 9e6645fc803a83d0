"""Training steps against one graph of autograd: precision, clipping, skipped steps, resuming."""

from __future__ import annotations

import copy
import functools
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics, Precision
from s4g_ray.errors import RunError
from s4g_ray.training.optimizer import learning_rate
from s4g_ray.training.step import (
    TrainingStep,
    describe_non_finite,
    step_seed,
)
from tests.support.step_batches import (
    BATCHES,
    CPU,
    PAIRS,
    assert_close,
    config,
    encoder,
    make_batch,
    oracle,
    overflow,
    step,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_step_seeds_differ_by_run_epoch_batch_and_rank() -> None:
    keys = [(s, e, b, r) for s in range(3) for e in range(3) for b in range(3) for r in range(3)]
    assert len({step_seed(*key) for key in keys}) == len(keys)
    assert step_seed(1, 2, 3, 4) == step_seed(1, 2, 3, 4)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("micro", [None, 1, 3, 4])
def test_a_step_in_chunks_has_the_loss_and_the_gradient_of_the_whole_batch(
    name: str, micro: int | None
) -> None:
    batch = BATCHES[name]()
    assert_close(step(encoder(), batch, micro), oracle(encoder(), batch))


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "test_resnet"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_chunks_have_the_gradient_of_the_whole_batch_in_float32_too(
    name: str, channels_last: bool
) -> None:
    batch = BATCHES["masks"]()
    numerics = Numerics(channels_last=channels_last)
    found = step(encoder(name, dtype=torch.float32), batch, 3, numerics)
    assert_close(found, oracle(encoder(name, dtype=torch.float32), batch), 1e-3)


@pytest.mark.parametrize("micro", [PAIRS, PAIRS + 1])
def test_chunks_as_large_as_the_batch_are_the_plain_step_bit_for_bit(micro: int) -> None:
    found = step(encoder(drop_path=0.5), BATCHES["gallery"](), micro)
    wanted = step(encoder(drop_path=0.5), BATCHES["gallery"](), None)
    assert found[0] == wanted[0]
    assert all(torch.equal(found[1][name], gradient) for name, gradient in wanted[1].items())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["test_convnext", "test_resnet"])
def test_both_passes_over_a_chunk_drop_the_same_paths(name: str, checkpointing: bool) -> None:
    """Otherwise the gradients would be those of other embeddings."""
    batch = BATCHES["gallery"]()
    chunks = [slice(0, 3), slice(3, 6), slice(6, 8)]
    wanted = oracle(encoder(name, drop_path=0.6), batch, chunks)
    model = encoder(name, drop_path=0.6, checkpointing=checkpointing)
    assert_close(step(model, batch, 3), wanted)
    without = oracle(encoder(name), batch, chunks)
    assert abs(without[0] - wanted[0]) > 1e-6


def test_random_draws_depend_only_on_the_seed_of_the_step() -> None:
    losses = []
    for seed, before in ((1, 3), (1, 4), (2, 3)):
        training_step = TrainingStep(encoder(drop_path=0.6), Numerics(), config(3), CPU)
        torch.manual_seed(before)
        torch.rand(before)
        result = training_step.step(make_batch(), seed=seed, position=0.5)
        losses.append(result.loss.item())
    assert losses[0] == losses[1] != losses[2]


class SavedElements:
    """Count the elements of activations that autograd holds, except weights and views of them."""

    def __init__(self, model: Encoder) -> None:
        self.now = 0
        self.peak = 0
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(self, tensor: Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() in self.weights:
            return tensor
        saved = self
        size = tensor.numel()
        saved.now += size
        saved.peak = max(saved.peak, saved.now)

        class Holder:
            held = tensor.detach()

            def __del__(self) -> None:
                saved.now -= size

        return Holder()

    @staticmethod
    def unpack(packed: Any) -> Tensor:
        tensor: Tensor = packed if isinstance(packed, Tensor) else packed.held
        return tensor


def test_activations_of_at_most_one_chunk_are_held() -> None:
    peaks = {}
    for micro in (None, 4, 2, 1):
        model = encoder()
        saved = SavedElements(model)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            step(model, make_batch(), micro)
        assert saved.now == 0
        peaks[micro] = saved.peak
    assert peaks[4] == pytest.approx(peaks[None] / 2, rel=0.1)
    assert peaks[2] == pytest.approx(peaks[None] / 4, rel=0.1)
    assert peaks[1] == pytest.approx(peaks[None] / 8, rel=0.1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("micro", [None, 3])
def test_half_precision_steps_come_close_to_float32(
    precision: Precision, micro: int | None
) -> None:
    batch = BATCHES["masks"]()
    loss, wanted = step(encoder(dtype=torch.float32), batch)
    found_loss, found = step(encoder(dtype=torch.float32), batch, micro, Numerics(precision))
    assert found_loss == pytest.approx(loss, rel=0.02)
    found_row, wanted_row = (
        torch.cat([gradient.flatten() for gradient in gradients.values()])
        for gradients in (found, wanted)
    )
    assert torch.nn.functional.cosine_similarity(found_row, wanted_row, dim=0) > 0.98
    assert found_loss != loss


PLAIN = [name for name in BATCHES if name != "soft"]  # one configuration trains on all of them


def train(micro: int | None, decay_norms: bool) -> dict[str, Tensor]:
    """Return the weights after a step on each of PLAIN."""
    model = encoder()
    cfg = config(micro, clip_value=0.02)
    training_step = TrainingStep(model, Numerics(), cfg, CPU, decay_norms=decay_norms)
    for number, name in enumerate(PLAIN):
        training_step.step(BATCHES[name](), seed=number, position=0.5 * number)
    return {name: p.detach() for name, p in model.named_parameters()}


@functools.cache
def adamw_weights(decay_norms: bool) -> dict[str, Tensor]:
    """Return the weights after AdamW's formulas, parameter by parameter.

    Source: arXiv 1711.05101, algorithm 2.
    """
    model = encoder()
    cfg = config()
    first = {key: torch.zeros_like(p) for key, p in model.named_parameters()}
    second = {key: torch.zeros_like(p) for key, p in model.named_parameters()}
    for number, name in enumerate(PLAIN):
        model.zero_grad()
        _, found = oracle(model, BATCHES[name]())
        rate = learning_rate(cfg, 0.5 * number)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                gradient = found[key].clamp(-0.02, 0.02)
                first[key] += 0.1 * (gradient - first[key])
                second[key] += 0.001 * (gradient**2 - second[key])
                mean = first[key] / (1 - 0.9 ** (number + 1))
                square = second[key] / (1 - 0.999 ** (number + 1))
                decay = cfg.weight_decay if decay_norms or parameter.ndim > 1 else 0.0
                update = mean / (square.sqrt() + 1e-8) + decay * parameter
                parameter.sub_(rate * update)
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("micro", "decay_norms"), [(None, True), (None, False), (3, True)])
def test_steps_clip_follow_the_learning_rate_and_end_at_the_same_weights_in_chunks(
    micro: int | None, decay_norms: bool
) -> None:
    found = train(micro, decay_norms)
    start = dict(encoder().named_parameters())
    for name, wanted in adamw_weights(decay_norms).items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-9, atol=1e-9)
        assert (wanted - start[name]).abs().max() > 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gradients_are_clipped_by_value_after_unscaling(precision: Precision) -> None:
    numerics = Numerics(precision)
    model = encoder(dtype=torch.float32)
    _, clipped = step(model, make_batch(), 3, numerics, clip_value=0.01)
    _, unclipped = step(encoder(dtype=torch.float32), make_batch(), 3, numerics)
    assert any(gradient.abs().max() > 0.02 for gradient in unclipped.values())
    for name, gradient in unclipped.items():
        assert torch.equal(clipped[name], gradient.clamp(-0.01, 0.01))


def make_fp16_step(scale: float, micro: int | None = None) -> TrainingStep:
    """Make a TrainingStep in fp16 that scales its gradients by `scale`."""
    model = encoder(dtype=torch.float32)
    training_step = TrainingStep(model, Numerics("fp16"), config(micro), CPU)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    training_step.load({**training_step.state(), "scaler": scaler.state_dict()}, "here")
    return training_step


@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize(("scale", "skipped"), [(2.0**10, False), (2.0**40, True)])
def test_a_step_with_overflowing_gradients_is_skipped_and_reported_and_lowers_the_scale(
    scale: float, skipped: bool, micro: int | None
) -> None:
    training_step = make_fp16_step(scale, micro)
    before = [p.clone() for p in training_step.encoder.parameters()]
    result = training_step.step(make_batch(), seed=1, position=0.5)
    assert np.isfinite(result.loss.item())
    assert result.is_skipped.item() == skipped
    after = training_step.encoder.parameters()
    unchanged = [torch.equal(*pair) for pair in zip(before, after, strict=True)]
    assert all(unchanged) if skipped else not any(unchanged)
    assert training_step.scaler.get_scale() == (scale / 2 if skipped else scale)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("micro", [None, 3])
def test_a_step_whose_gradients_are_not_finite_changes_nothing_in_any_precision(
    precision: Precision, micro: int | None
) -> None:
    """One element of the gradient of the last batch is infinite, or the loss is not a number."""
    model = encoder(dtype=torch.float32)
    training_step = TrainingStep(model, Numerics(precision), config(micro, clip_norm=1), CPU)
    training_step.step(make_batch(), seed=1, position=0.5)
    before = copy.deepcopy((model.state_dict(), training_step.optimizer.adamw.state_dict()))
    removable = overflow(model)
    assert training_step.step(make_batch(), seed=2, position=0.5).is_skipped
    removable.remove()
    weight = next(model.model.parameters()).data
    kept = weight.clone()
    weight.fill_(torch.nan)
    result = training_step.step(make_batch(), seed=3, position=0.5)
    weight.copy_(kept)
    assert result.is_skipped
    assert not result.loss.isfinite()
    assert result.bad_rows.all()
    after = (model.state_dict(), training_step.optimizer.adamw.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert not training_step.step(make_batch(), seed=4, position=0.5).is_skipped


def test_gradients_are_scaled_only_in_fp16_from_the_published_value_on() -> None:
    precisions: list[Precision] = ["fp16", "bf16", "fp32"]
    scalers = [
        TrainingStep(encoder(), Numerics(precision), config(), CPU).scaler
        for precision in precisions
    ]
    assert [scaler.get_scale() for scaler in scalers] == [1024, 1, 1]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_training_resumes_from_a_saved_state_bit_for_bit(precision: Precision) -> None:
    def run(model: Encoder, numbers: range, state: bytes | None) -> tuple[Encoder, bytes]:
        training_step = TrainingStep(model, Numerics(precision), config(3), CPU)
        if state is not None:
            training_step.load(torch.load(io.BytesIO(state), weights_only=True), "here")
        for number in numbers:
            seed = step_seed(1, 1, number, 0)
            training_step.step(make_batch(), seed=seed, position=number / 4)
        saved = io.BytesIO()
        torch.save(training_step.state(), saved)
        return model, saved.getvalue()

    def fresh() -> Encoder:
        return encoder(drop_path=0.5, dtype=torch.float32)

    whole, _ = run(fresh(), range(4), None)
    half, state = run(fresh(), range(2), None)
    resumed = fresh()
    resumed.load_state_dict(half.state_dict())
    torch.rand(17)
    run(resumed, range(2, 4), state)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([1, 9, 10], "non-finite embeddings for query ids [31, 32]"),
        ([2, 16], "non-finite embeddings for query ids [32] and gallery reference ids [70]"),
        ([17], "non-finite embeddings for gallery reference ids [71]"),
        ([7, 15, 18], ""),  # empty slots
        ([], ""),
    ],
)
def test_embeddings_that_are_not_finite_are_named_by_query_and_by_gallery_reference(
    rows: list[int], named: str
) -> None:
    batch = replace(
        make_batch(gallery=3),
        query_ids=np.array([30, 31, 32, 33, 34, 35, 36, -1]),
        gallery_ids=np.array([70, 71, -1]),
    )
    bad_rows = torch.zeros(2 * PAIRS + 3, dtype=torch.bool)
    bad_rows[rows] = True
    assert describe_non_finite(batch, bad_rows) == named


def test_averaged_weights_are_published_and_the_trained_ones_resumed() -> None:
    model = encoder()
    training_step = TrainingStep(model, Numerics(), config(ema_decay=0.9), CPU)
    wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
    for number in range(3):
        training_step.step(make_batch(), seed=number, position=0.5)
        for name, parameter in model.named_parameters():
            wanted[name] = 0.9 * wanted[name] + 0.1 * parameter.detach()
    published = training_step.weights()
    for name, value in wanted.items():
        torch.testing.assert_close(published[name], value, rtol=1e-12, atol=1e-12)
    assert published.keys() == model.state_dict().keys()
    state = copy.deepcopy(training_step.state())
    resumed = encoder()
    resumed.load_state_dict(copy.deepcopy(published))
    again = TrainingStep(resumed, Numerics(), config(ema_decay=0.9), CPU)
    again.load(state, "here")
    for one in (training_step, again):
        one.step(make_batch(), seed=9, position=0.5)
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(again.weights(), training_step.weights(), rtol=0, atol=0)


def test_the_whole_gradient_is_clipped_by_norm_and_the_logit_scale_limited() -> None:
    model = encoder()
    _, unclipped = step(model, make_batch())
    norm = torch.cat([gradient.flatten() for gradient in unclipped.values()]).norm()
    model = encoder()
    limit = float(model.logit_scale.detach().exp()) - 1
    _, clipped = step(model, make_batch(), clip_norm=0.5 * float(norm), max_logit_scale=limit)
    for name, gradient in unclipped.items():
        torch.testing.assert_close(clipped[name], 0.5 * gradient, rtol=1e-5, atol=1e-12)
    assert model.logit_scale.item() == pytest.approx(np.log(limit))


def test_the_state_of_other_parameters_is_refused() -> None:
    state = TrainingStep(encoder("test_resnet"), Numerics(), config(), CPU).state()
    with pytest.raises(RunError, match="here"):
        TrainingStep(encoder(), Numerics(), config(), CPU).load(state, "here")
