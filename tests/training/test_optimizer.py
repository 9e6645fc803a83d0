"""The schedule of the learning rate, and the groups of parameters."""

from __future__ import annotations

import pytest

from s4g_ray.config.schema import RunConfig
from s4g_ray.config.training_schema import TrainConfig
from s4g_ray.training.optimizer import group_parameters, learning_rate
from tests.support.step_batches import encoder


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


def test_other_schedules_and_an_end_value() -> None:
    settings = {"epochs": 11, "learning_rate": 0.2}
    constant = TrainConfig(schedule="constant", **settings)
    assert [learning_rate(constant, at) for at in (0.5, 1, 6, 11)] == [0.1, 0.2, 0.2, 0.2]
    cosine = TrainConfig(end_learning_rate=0.1, **settings)
    assert [learning_rate(cosine, at) for at in (1, 6, 11)] == pytest.approx([0.2, 0.15, 0.1])
    line = TrainConfig(schedule="polynomial", end_learning_rate=0.1, **settings)
    assert [learning_rate(line, at) for at in (1, 3.5, 11)] == pytest.approx([0.2, 0.175, 0.1])
    square = TrainConfig(schedule="polynomial", schedule_power=2, **settings)
    assert learning_rate(square, 6) == pytest.approx(0.05)


def test_an_end_above_the_learning_rate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"end_learning_rate=0\.1 exceeds learning_rate=0\.01"):
        TrainConfig(learning_rate=0.01, end_learning_rate=0.1)


def test_norms_and_biases_decay_with_protocol_paper_or_where_it_is_set() -> None:
    def decays(protocol: str, decay_norms: bool | None) -> bool:
        train = {"decay_norms": decay_norms}
        data = {"uri": "data"}
        return RunConfig.model_validate(
            {"run_dir": "run", "protocol": protocol, "data": data, "train": train}
        ).decays_norms

    assert [decays("paper", None), decays("strict", None)] == [True, False]
    assert [decays("paper", False), decays("strict", True)] == [False, True]


@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
def test_each_layer_learns_at_a_share_of_the_rate_of_the_layer_after_it(name: str) -> None:
    model = encoder(name)
    groups = group_parameters(model, TrainConfig(layer_decay=0.5), decay_norms=False)
    scale_of = {id(p): group["scale"] for group in groups for p in group["params"]}
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(scale_of) == len(list(model.parameters()))
    named = dict(model.named_parameters())
    first = next(n for n in named if "stem.0" in n or "patch_embed" in n)
    assert scale_of[id(named["logit_scale"])] == 1
    assert scale_of[id(named[first])] == min(scale_of.values()) < 0.3
    assert set(scale_of.values()) == {0.5**i for i in range(len(set(scale_of.values())))}
    for parameter_name, parameter in named.items():
        assert (decay_of[id(parameter)] == 0) == (parameter.ndim <= 1), parameter_name
    frozen = next(iter(named.values()))
    frozen.requires_grad_(False)
    groups = group_parameters(model, TrainConfig(), decay_norms=True)
    assert len(groups) == 1
    assert len(groups[0]["params"]) == len(named) - 1
