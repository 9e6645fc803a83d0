"""The fault matrix: a run with any fault at any moment ends with the weights of one without faults.

Runs are those of the real command. Parts of the run's own Ray session (workers, shards, embedding
actors) are replaced while the command continues; a command that dies is resumed by the same command
with --resume.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s4g_ray.config.loading import override_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.encoder.checkpoint import load_encoder, newest_checkpoint
from s4g_ray.storage.manifest import is_published
from tests.conftest import NUM_TRAIN, overlapped_config
from tests.support.faulty_runs import (
    AGENTS,
    ENCODER,
    SHARD,
    TRAINER,
    Command,
    Fault,
    assert_same_end,
    held,
    records,
    steps,
)
from tests.support.two_node_run import DIED, RELEASED

pytestmark = pytest.mark.cluster
BATCHES = NUM_TRAIN // 16
LATE_PART = "embeddings/v=0001/queries/part-00001.parquet"


def configure(folder: Path, dataset: GeoDataset, **train: Any) -> RunConfig:
    return overlapped_config(folder / "run", dataset.uri, train=train)


def fault(folder: Path, at: str, do: str = "kill") -> Fault:
    return {"at": at, "do": do, "marker": str(folder / f"{do}-{at.replace('/', '-')}")}


def test_what_dies_in_the_cluster_is_replaced_while_the_command_goes_on(
    synthetic: GeoDataset, undisturbed: RunConfig, tmp_path: Path
) -> None:
    """A worker; one that uploads a checkpoint; an embedding actor; an index shard; all workers."""
    config = configure(tmp_path, synthetic, max_failures=4, loader_processes=1)
    rng = np.random.default_rng(20)
    upload = fault(tmp_path, f"checkpoints/step={2 * rng.integers(4, 6):04d}/training_state")
    # the run waits for each death
    second_epoch, killed = tmp_path / "second_epoch", tmp_path / "killed"
    part = held("embeddings/v=0001/queries/part-00000.parquet", tmp_path / "part")
    shard = held("index/v=0001/shard-00000", tmp_path / "shard")
    waits = [
        held("plans/epoch=0002", second_epoch),
        held("checkpoints/epoch=0004/training_state", killed),
    ]
    command = Command(config, [upload, part, shard, *waits])
    first = int(rng.integers(1, BATCHES))
    command.wait_for(lambda: steps(config)[-1:] >= [first])
    command.kill(TRAINER)
    second_epoch.touch()
    command.kill_while_held(part, ENCODER)
    command.kill_while_held(shard, SHARD)
    command.wait_for(lambda: Path(upload["marker"]).exists())
    last = int(rng.integers(2 * BATCHES, 3 * BATCHES))
    command.wait_for(lambda: steps(config)[-1:] >= [last])
    command.kill(TRAINER, 2)
    killed.touch()
    assert command.wait() == 0, command.output
    assert command.left_behind() == []
    lost = records(config, "lost")
    assert len(lost) == 3, command.output
    assert command.output.count("continuing with 2 workers after step") == 3
    assert "(raylet)" not in command.output
    assert_same_end(config, undisturbed)


def end(config: RunConfig, status: int, *faults: Fault) -> Command:
    """A command that continues a run until a fault ends it, or the run is done."""
    command = Command(config, faults, resume=True)
    assert command.wait() == status, command.output
    assert command.left_behind(but=AGENTS if status < 0 else ()) == []
    assert all(Path(f["marker"]).exists() for f in faults)
    return command


# Takes more than a minute: each of the ten commands starts a Ray session, its workers and its
# actors anew. The death of a driver ends them all, and the test is about what such a start finds in
# the folder.
def test_a_command_that_ends_at_any_moment_for_any_reason_is_resumed_to_the_same_end(
    synthetic: GeoDataset, undisturbed: RunConfig, tmp_path: Path
) -> None:
    """SIGTERM before and in training; one worker too many lost; a full disk; the coordinator alone
    dies; the driver dies between the parts of embeddings, while it publishes a graph, a plan, and
    within an epoch.
    """
    config, rng = configure(tmp_path, synthetic), np.random.default_rng(21)
    stop_before_training(config)
    lose_more_workers_than_allowed(config, moment=int(rng.integers(2, BATCHES)))
    fill_the_disk(config, fault(tmp_path, "checkpoints/epoch=0002", "full"))

    killed = [kill_between_parts(config)]
    assert not is_published(f"{config.run_dir}/embeddings/v=0001")
    kept = times_of_parts(config)
    assert len(kept) >= 3
    killed += [end(config, -signal.SIGKILL, fault(tmp_path, "neighbors/v=0001/_MANIFEST"))]
    assert is_published(f"{config.run_dir}/embeddings/v=0001")
    assert {part: part.stat().st_mtime_ns for part in kept} == kept
    killed += [end(config, -signal.SIGKILL, fault(tmp_path, "plans/epoch=0003"))]
    assert is_published(f"{config.run_dir}/neighbors/v=0001")
    killed += [kill_within_an_epoch(config, moment=2 * BATCHES + int(rng.integers(1, 3)))]

    ended = end(config, 1, fault(tmp_path, "neighbors/v=0002/_MANIFEST", "die"))
    assert "the coordinator died: SystemExit('on cue')" in ended.output
    stop_in_training(config)
    last = end(config, 0)
    assert "resuming after epoch" in last.output
    assert_same_end(config, undisturbed)
    assert [command.left_behind(within_s=100) for command in [*killed, ended, last]] == [[]] * 6


def stop_before_training(config: RunConfig) -> None:
    command = Command(config)
    command.wait_for(lambda: (Path(config.run_dir) / "run.json").exists())
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == 0, command.output
    assert "resume with: " in command.output
    assert command.left_behind() == []


def lose_more_workers_than_allowed(config: RunConfig, moment: int) -> None:
    # with no failure to spare, workers have one try to start; they do not end the epoch meanwhile
    command = Command(
        override_config(config, ["train.max_failures=0", "ray.start_timeout_s=300"]),
        [held("checkpoints/epoch=0001/training_state", f"{config.run_dir}/never")],
        resume=True,
    )
    command.wait_for(lambda: steps(config)[-1:] >= [moment])
    command.kill(TRAINER)
    assert command.wait() == 1, command.output
    assert "training ended early" in command.output
    assert command.left_behind() == []


def fill_the_disk(config: RunConfig, full: Fault) -> None:
    # the first embeddings are not complete before
    said = end(config, 1, held(LATE_PART, full["marker"]), full).output
    assert "No space left on device; published files stay readable" in said
    assert "Traceback" not in said
    reached = newest_checkpoint(config.run_dir)
    assert reached is not None
    assert reached.step == 2 * BATCHES - 2
    load_encoder(config.model, reached.uri)


def kill_between_parts(config: RunConfig) -> Command:
    # the run cannot pass the part that is never written
    faults = [held(LATE_PART, f"{config.run_dir}/never")]
    command = Command(config, faults, resume=True)
    command.wait_for(lambda: len(times_of_parts(config)) >= 3)
    os.kill(command.process.pid, signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL
    assert command.left_behind(but=AGENTS) == []
    return command


def times_of_parts(config: RunConfig) -> dict[Path, int]:
    """When the committed parts of the first embeddings were written."""
    folder = Path(config.run_dir, "embeddings/v=0001")
    commits = (folder / "_work").glob("*/part-*.parquet.json")
    parts = [folder / commit.parent.name / commit.stem for commit in commits]
    return {part: part.stat().st_mtime_ns for part in parts}


def kill_within_an_epoch(config: RunConfig, moment: int) -> Command:
    # the workers wait for a checkpoint that is never written: they cannot end the epoch meanwhile;
    # nor is the next graph published
    never = f"{config.run_dir}/never"
    faults = [
        held(f"checkpoints/step={2 * BATCHES + 2:04d}/training_state", never),
        held("neighbors/v=0002/_MANIFEST", never),
    ]
    command = Command(config, faults, resume=True)
    command.wait_for(lambda: steps(config)[-1:] >= [moment])
    os.kill(command.process.pid, signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL
    assert command.left_behind(but=AGENTS) == []
    return command


def stop_in_training(config: RunConfig) -> None:
    # the run cannot end before the signal: the workers wait for a checkpoint of the last epoch
    sent = Path(config.run_dir).with_name("sent")
    last = f"checkpoints/step={3 * BATCHES + 2:04d}/training_state"
    command = Command(config, [held(last, sent)], resume=True)
    reached = newest_checkpoint(config.run_dir)
    assert reached is not None
    command.wait_for(lambda: steps(config)[-1:] > [reached.step])
    command.process.send_signal(signal.SIGTERM)
    sent.touch()
    assert command.wait() == 0, command.output
    assert command.left_behind() == []
    stopped = newest_checkpoint(config.run_dir)
    assert stopped is not None
    assert stopped.step == steps(config)[-1] > reached.step
    assert f"the newest checkpoint is that of step {stopped.step}\n" in command.output
    assert (
        f"resume with: s4g train {Path(config.run_dir).with_suffix('.yaml')} --resume"
        in command.output
    )


# Takes more than a minute: the workers start three times on a cluster of its own, once in vain.
def test_a_run_goes_on_with_one_worker_after_the_death_of_a_node_and_with_two_on_one_that_comes(
    synthetic: GeoDataset, tmp_path: Path
) -> None:
    """Each node has room for one worker; tests/test_spread.py has the run that waits for a node."""
    epochs = 6
    config = configure(
        tmp_path,
        synthetic,
        num_workers=[1, 2],
        cpus_per_worker=1.5,
        resize_every_s=1,
        max_failures=5,
        epochs=epochs,
    )
    # Ray Train first waits start_timeout_s for the two workers that there is room for no longer
    config = override_config(
        config, ["ray.num_cpus=null", "ray.start_timeout_s=25", "mining.every_epochs=2"]
    )
    # epochs are planned when the node has died, and has come: the run cannot pass either
    waits = [
        held("plans/epoch=0003", Path(config.run_dir, DIED)),
        held("plans/epoch=0005", Path(config.run_dir, RELEASED)),
    ]
    command = Command(config, waits, module="tests.support.two_node_run")
    assert command.wait() == 0, command.output
    assert command.left_behind() == []
    assert steps(config) == list(range(1, epochs * BATCHES + 1))
    lines = records(config, "epoch")
    assert {line["workers"] for line in lines} == {1, 2}
    assert all(line["pairs_left_out"] == 0 for line in lines)  # the batch is what it was
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
