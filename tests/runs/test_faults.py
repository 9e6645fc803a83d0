"""The fault matrix: whatever dies, at whatever moment, a run ends with the weights of one that nothing has happened to.

Runs are those of the real command. What lives in the run's own Ray session (workers, shards, embedding actors) is
replaced while the command goes on; when the command itself dies, the same command with --resume goes on.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from s4g_ray.config.loading import override_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.encoder.checkpoint import load_encoder, newest_checkpoint
from s4g_ray.storage.manifest import is_published, open_published, read_part
from tests.conftest import NUM_TRAIN, tiny_config
from tests.support.faulty_runs import (
    AGENTS,
    ENCODER,
    SHARD,
    TRAINER,
    Command,
    Fault,
    records,
    steps,
)

pytestmark = pytest.mark.cluster
EPOCHS, BATCHES = 4, NUM_TRAIN // 16
ENDED: list[Command] = []


def configure(folder: Path, dataset: GeoDataset, **train: Any) -> RunConfig:
    """Mining beside training, a checkpoint every other step."""
    return tiny_config(
        folder / "run",
        dataset.uri,
        ray={"num_cpus": 4},
        train={"epochs": EPOCHS, **train},
        checkpoint={"every_steps": 2},
        evaluation={"every_epochs": 2, "before_training": False},
        mining={"schedule": "overlap", "every_epochs": 1, "lag_epochs": 1, "exact_engine": "torch"},
    )


@pytest.fixture(scope="module")
def whole(synthetic: GeoDataset, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that nothing happens to."""
    config = configure(tmp_path_factory.mktemp("whole"), synthetic)
    command = Command(config)
    assert command.wait() == 0, command.output
    return config


def assert_same_end(config: RunConfig, whole: RunConfig) -> None:
    """The same weights and optimiser, bit for bit; the same plans; each step logged once, and no file torn."""
    ours, theirs = (Path(c.run_dir) for c in (config, whole))
    name = f"checkpoints/epoch={EPOCHS:04d}"
    assert (ours / name / "model.safetensors").read_bytes() == (
        theirs / name / "model.safetensors"
    ).read_bytes()
    states = [
        torch.load(run / name / "training_state.pt", weights_only=True) for run in (ours, theirs)
    ]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert steps(config) == list(range(1, EPOCHS * BATCHES + 1))
    wanted = {
        "epoch": ("epoch", "loss", "graph", "hardness", "step"),
        "evaluation": ("epoch", "recall@1"),
    }
    for kind, keys in wanted.items():
        logged = [[[r[key] for key in keys] for r in records(c, kind)] for c in (config, whole)]
        assert logged[0] == logged[1]
    for plan in (theirs / "plans").iterdir():
        assert (ours / "plans" / plan.name).read_bytes() == plan.read_bytes()
    for folder in ("neighbors", "checkpoints", "embeddings"):
        for version in (ours / folder).iterdir():
            kind = {
                "neighbors": "neighbors",
                "checkpoints": "checkpoint",
                "embeddings": "embeddings",
            }[folder]
            for part in open_published(str(version), kind).parts:
                read_part(str(version), part)


def fault(folder: Path, at: str, do: str = "kill") -> Fault:
    return {"at": at, "do": do, "marker": str(folder / f"{do}-{at.replace('/', '-')}")}


def test_what_dies_in_the_cluster_is_replaced_while_the_command_goes_on(
    synthetic: GeoDataset, whole: RunConfig, tmp_path: Path
) -> None:
    """A worker; a worker that uploads a checkpoint; an embedding actor; an index shard; all workers."""
    config, rng = (
        configure(tmp_path, synthetic, max_failures=4, loader_processes=1),
        np.random.default_rng(20),
    )
    upload = fault(tmp_path, f"checkpoints/step={2 * rng.integers(4, 6):04d}/training_state")
    command = Command(config, [upload])
    first = int(rng.integers(1, BATCHES))
    command.wait_for(lambda: steps(config)[-1:] >= [first])
    command.kill(TRAINER)
    command.kill(f"{ENCODER}.encode")
    command.kill(f"{SHARD}.")
    command.wait_for(lambda: Path(upload["marker"]).exists())
    last = int(rng.integers(2 * BATCHES, 3 * BATCHES))
    command.wait_for(lambda: steps(config)[-1:] >= [last])
    command.kill(TRAINER, 2)
    assert command.wait() == 0, command.output
    assert command.left_behind() == []
    lost = records(config, "lost")
    assert len(lost) == 3, command.output
    assert command.output.count("going on with 2 workers after step") == 3
    assert "(raylet)" not in command.output
    assert_same_end(config, whole)


def end(config: RunConfig, status: int, *faults: Fault, resume: bool = True) -> str:
    """What a command prints that a fault ends."""
    command = Command(config, faults, resume)
    assert command.wait() == status, command.output
    assert command.left_behind(but=AGENTS if status < 0 else ()) == []
    ENDED.append(command)
    assert all(Path(f["marker"]).exists() for f in faults)
    return command.output


def test_a_driver_that_dies_at_any_moment_is_resumed_to_the_same_end(
    synthetic: GeoDataset, whole: RunConfig, tmp_path: Path
) -> None:
    """While it publishes embeddings, a graph, a plan; within an epoch; its coordinator alone; told by SIGTERM."""
    config, rng = configure(tmp_path, synthetic), np.random.default_rng(21)
    command = Command(config)
    command.wait_for(lambda: (Path(config.run_dir) / "run.json").exists())
    command.process.send_signal(signal.SIGTERM)  # before anything is trained
    assert command.wait(120) == 0, command.output
    assert "resume with: " in command.output
    assert command.left_behind() == []
    end(config, -signal.SIGKILL, fault(tmp_path, "embeddings/v=0001/_MANIFEST"))
    assert not is_published(f"{config.run_dir}/embeddings/v=0001")
    end(config, -signal.SIGKILL, fault(tmp_path, "neighbors/v=0001/_MANIFEST"))
    assert is_published(f"{config.run_dir}/embeddings/v=0001")
    end(config, -signal.SIGKILL, fault(tmp_path, "plans/epoch=0003"))
    assert is_published(f"{config.run_dir}/neighbors/v=0001")

    command = Command(config, resume=True)
    moment = int(rng.integers(2 * BATCHES + 1, 3 * BATCHES))
    command.wait_for(lambda: steps(config)[-1:] >= [moment])
    os.kill(command.process.pid, signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL
    assert command.left_behind(but=AGENTS) == []

    said = end(config, 1, fault(tmp_path, "neighbors/v=0002/_MANIFEST", "die"))
    assert "the coordinator died: SystemExit('on cue')" in said

    command, reached = Command(config, resume=True), newest_checkpoint(config.run_dir)
    assert reached is not None
    command.wait_for(lambda: steps(config)[-1:] > [reached.step])
    command.process.send_signal(signal.SIGTERM)
    assert command.wait(120) == 0, command.output
    assert command.left_behind() == []
    stopped = newest_checkpoint(config.run_dir)
    assert stopped is not None
    assert stopped.step == steps(config)[-1] > reached.step
    assert f"the newest checkpoint is that of step {stopped.step}\n" in command.output
    assert (
        f"resume with: s4g train {Path(config.run_dir).with_suffix('.yaml')} --resume"
        in command.output
    )

    assert "going on after epoch" in end(config, 0)
    assert_same_end(config, whole)
    assert [command.left_behind(within_s=100) for command in ENDED if command.config == config] == [
        []
    ] * 5


def test_a_run_that_may_lose_no_worker_and_then_fills_the_disk_stops_with_the_reason_and_goes_on(
    synthetic: GeoDataset, whole: RunConfig, tmp_path: Path
) -> None:
    config, rng = configure(tmp_path, synthetic, max_failures=0), np.random.default_rng(22)
    command = Command(config)
    moment = int(rng.integers(2, BATCHES))
    command.wait_for(lambda: steps(config)[-1:] >= [moment])
    command.kill(TRAINER)
    assert command.wait() == 1, command.output
    assert "training ended early" in command.output
    assert command.left_behind() == []

    full = fault(tmp_path, "checkpoints/epoch=0002", "full")
    said = end(config, 1, full)
    assert "No space left on device; what was published stays readable" in said
    assert "Traceback" not in said
    reached = newest_checkpoint(config.run_dir)
    assert reached is not None
    assert reached.step == 2 * BATCHES - 2
    load_encoder(config.model, reached.uri)

    end(config, 0)
    assert_same_end(config, whole)


@pytest.mark.parametrize("least", [1, 2])
def test_a_run_goes_on_after_the_death_of_a_node_with_fewer_workers_or_on_one_that_comes(
    synthetic: GeoDataset, whole: RunConfig, tmp_path: Path, least: int
) -> None:
    """Each node has room for one worker. Embedding actor and index shard may be on the node that dies, too."""
    epochs = 30 if least == 1 else EPOCHS
    config = configure(
        tmp_path,
        synthetic,
        num_workers=[1, 2] if least == 1 else 2,
        cpus_per_worker=1.5,
        resize_every_s=3,
        max_failures=5,
        epochs=epochs,
    )
    config = override_config(
        config, ["ray.num_cpus=null", f"mining.every_epochs={10 if least == 1 else 1}"]
    )
    command = Command(config, module="tests.node_run")
    assert command.wait(600) == 0, command.output
    assert command.left_behind() == []
    if least == 2:
        assert_same_end(config, whole)
        return
    assert steps(config) == list(range(1, epochs * BATCHES + 1))
    lines = records(config, "epoch")
    assert {line["workers"] for line in lines} == {1, 2}
    assert all(line["pairs_left_out"] == 0 for line in lines)  # the batch is what it was
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
