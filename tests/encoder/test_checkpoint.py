"""Checkpoints of a run: the newest one, the ones that pruning keeps, and damaged ones."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from s4g_ray.config.training_schema import ModelConfig
from s4g_ray.encoder.checkpoint import (
    Checkpoint,
    epoch_uri,
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    step_uri,
)
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.weights import check_finite
from s4g_ray.errors import RunError
from s4g_ray.storage import files
from s4g_ray.storage.manifest import is_published


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.build(ModelConfig(name="test_convnext", pretrained=False))


@pytest.fixture
def run(encoder: Encoder, tmp_path: Path) -> str:
    """Make a run: 3 epochs of 10 steps, a checkpoint every 4 steps, and 2 interrupted uploads."""
    run = str(tmp_path)
    for epoch in range(4):
        save_checkpoint(epoch_uri(run, epoch), encoder, None, epoch=epoch, step=10 * epoch)
    for step in (4, 8, 12, 16, 24, 28, 32):
        save_checkpoint(
            step_uri(run, step), encoder, {"lag": 0.5}, epoch=step // 10, step=step, batch=step % 10
        )
    for uri in (step_uri(run, 20), step_uri(run, 36)):
        shutil.copytree(step_uri(run, 32), uri)
        (Path(uri) / files.MANIFEST).unlink()
    return run


def names(run: str) -> set[str]:
    return set(files.list_names(f"{run}/checkpoints"))


def test_the_newest_checkpoint_has_the_highest_step_and_is_published(run: str) -> None:
    found = newest_checkpoint(run)
    assert found is not None
    assert (found.uri, found.epoch, found.step, found.batch) == (step_uri(run, 32), 3, 32, 2)
    files.remove(found.uri)
    found = newest_checkpoint(run)
    assert found is not None
    assert (found.uri, found.batch) == (epoch_uri(run, 3), 0)
    assert newest_checkpoint(f"{run}/none") is None
    steps = [checkpoint.step for checkpoint in list_checkpoints(run)]
    assert steps == [0, 4, 8, 10, 12, 16, 20, 24, 28, 30]


def test_pruning_keeps_the_newest_the_untrained_and_needed_ones_and_removes_partial_uploads(
    run: str,
) -> None:
    prune_checkpoints(run, keep=1, epochs={1}, since=2)
    assert names(run) == {
        "epoch=0000",
        "epoch=0001",
        "epoch=0002",
        "epoch=0003",
        "step=0032",
        "step=0036",
    }
    prune_checkpoints(run, keep=2, epochs={1}, since=9)
    assert names(run) == {"epoch=0000", "epoch=0001", "epoch=0003", "step=0032", "step=0036"}
    prune_checkpoints(run, keep=1, epochs=(), since=9)
    # the upload of step 36 may be in progress
    assert names(run) == {"epoch=0000", "step=0032", "step=0036"}


def test_state_is_read_back_and_an_altered_one_is_refused(run: str) -> None:
    state = Checkpoint.read(step_uri(run, 32)).training_state()
    assert state == {"lag": 0.5, "epoch": 3, "step": 32}
    assert Checkpoint.read(epoch_uri(run, 0)).training_state() is None
    torch.save({"lag": 0.0}, f"{step_uri(run, 32)}/training_state.pt")
    with pytest.raises(RunError, match="differs from the published file"):
        Checkpoint.read(step_uri(run, 32)).training_state()
    with pytest.raises(RunError, match="holds no published checkpoint"):
        Checkpoint.read(step_uri(run, 36))


def test_a_partly_removed_checkpoint_is_not_published(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[str] = []
    filesystem = type(files.filesystem_of(run)[0])
    monkeypatch.setattr(filesystem, "rm", lambda self, path, recursive=False: removed.append(path))
    files.remove(step_uri(run, 32))
    assert len(removed) == 1
    assert not is_published(step_uri(run, 32))
    assert files.exists(f"{step_uri(run, 32)}/model.safetensors")


def test_weights_that_are_not_finite_are_not_published(encoder: Encoder, tmp_path: Path) -> None:
    broken = copy.deepcopy(encoder)
    names = [name for name, _ in broken.named_parameters()]
    weights = dict(broken.named_parameters())
    uri = epoch_uri(str(tmp_path), 4)
    for value in (float("nan"), float("inf"), -float("inf")):
        with torch.no_grad():
            weights[names[3]].view(-1)[:2] = value
            weights[names[7]].view(-1)[-1] = value
        with pytest.raises(
            RunError,
            match=rf"the weights after step 40 are not finite: 3 values in 2 of \d+ tensors, first"
            rf" {names[3]}; they are not published. .*--from-epoch N",
        ):
            save_checkpoint(uri, broken, {"lag": 0.5}, epoch=4, step=40)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(RunError, match=r"the weights after step 0 .* Choose other weights$"):
        save_checkpoint(epoch_uri(str(tmp_path), 0), broken, None, epoch=0, step=0)


def test_a_statistic_that_is_not_finite_counts_and_large_finite_weights_do_not() -> None:
    layer = nn.BatchNorm1d(4)
    with torch.no_grad():
        layer.weight.fill_(torch.finfo(torch.float32).max)
    check_finite(layer.state_dict(), "the weights", "Stop")
    layer = nn.BatchNorm1d(4)
    assert layer.running_var is not None
    layer.running_var[2] = float("inf")
    with pytest.raises(RunError, match="1 values in 1 of 4 tensors, first running_var"):
        check_finite(layer.state_dict(), "the weights", "Stop")
    check_finite({"empty": torch.zeros(0)}, "no weights", "Stop")
    check_finite({}, "no weights", "Stop")
