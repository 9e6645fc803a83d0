"""Checkpoints published by a thread: what they hold, their order, and what their failure does."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from s4g_ray.config.training_schema import ModelConfig
from s4g_ray.encoder.checkpoint import Checkpoint, load_encoder, publish_checkpoint
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.errors import WriteError
from s4g_ray.training.checkpoint_writer import CheckpointWriter, Snapshot

TINY = ModelConfig(name="test_convnext", pretrained=False)


def test_a_snapshot_keeps_the_values_of_its_moment_and_its_memory() -> None:
    snapshot = Snapshot()
    weight = torch.arange(6.0).view(2, 3).to(memory_format=torch.contiguous_format)
    state = {"weights": {"a": weight}, "state": [{"step": 3, "betas": (0.9, 0.999)}, weight]}
    first = snapshot.copy(state)
    weight.add_(1)
    assert first["state"][0] == {"step": 3, "betas": (0.9, 0.999)}
    assert torch.equal(first["weights"]["a"], weight - 1)
    address = first["weights"]["a"].data_ptr()
    again = snapshot.copy(state)
    assert again["weights"]["a"].data_ptr() == address
    assert torch.equal(again["state"][1], weight)
    layout = snapshot.copy(
        {"weights": torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    )
    assert layout["weights"].is_contiguous(memory_format=torch.channels_last)


def test_training_goes_on_while_a_checkpoint_of_its_moment_is_published(tmp_path: Path) -> None:
    encoder = Encoder.build(TINY, seed=1)
    wanted = Encoder.build(TINY, seed=1).state_dict()
    may_publish = threading.Event()
    uri = str(tmp_path / "epoch=0001")

    def publish(copy: dict[str, Any]) -> None:
        assert may_publish.wait(60)
        publish_checkpoint(uri, copy["weights"], {}, dim=1, epoch=1, step=7)

    with CheckpointWriter() as writer:
        writer.submit({"weights": encoder.state_dict()}, publish)
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(1)
        writer.check()  # not yet published: nothing to raise
        assert not Path(uri).exists()
        may_publish.set()
        writer.wait()
    assert Checkpoint.read(uri).step == 7
    torch.testing.assert_close(load_encoder(TINY, uri).state_dict(), wanted, rtol=0, atol=0)


def test_one_checkpoint_is_written_at_a_time_in_their_order() -> None:
    events: list[str] = []
    go = threading.Event()

    def publish(name: str) -> Any:
        def run(_: Any) -> None:
            events.append(f"begin {name}")
            if name == "a":
                assert go.wait(60)
            events.append(f"end {name}")

        return run

    with CheckpointWriter() as writer:
        writer.submit({}, publish("a"))
        threading.Timer(0.2, go.set).start()
        writer.submit({}, publish("b"))
        assert events[:2] == ["begin a", "end a"]
    assert events == ["begin a", "end a", "begin b", "end b"]


@pytest.mark.parametrize("call", ["check", "wait", "submit"])
def test_a_failed_checkpoint_is_raised_by_the_next_call(call: str) -> None:
    def fail(_: Any) -> None:
        raise WriteError("the disk is full")

    def call_until_it_fails(writer: CheckpointWriter) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:  # the thread may not have failed yet
            getattr(writer, call)(*([{}, fail] if call == "submit" else []))

    with CheckpointWriter() as writer:
        writer.submit({}, fail)
        with pytest.raises(WriteError, match="the disk is full"):
            call_until_it_fails(writer)
