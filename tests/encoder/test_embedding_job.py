"""Embedding jobs: actors, parts kept from an interrupted job, skipped images."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import View
from s4g_ray.data.images import load_view
from s4g_ray.data.tables.embedding_table import read_embeddings
from s4g_ray.distributed.placement_gate import PlacementGate
from s4g_ray.encoder.actors import (
    EncoderActor,
    EncoderPool,
    Encoding,
    Pixels,
    encode_part_on,
    find_least_loaded,
)
from s4g_ray.encoder.checkpoint import checkpoint_stamp, save_checkpoint
from s4g_ray.encoder.embedding_job import (
    EmbeddingReport,
    embed,
    part_key,
    warm_rate,
)
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.encoder.weights import WEIGHTS
from s4g_ray.errors import BadImageError, GpuMemoryError, RunError
from s4g_ray.storage.manifest import is_published, open_published
from tests.conftest import NUM_TEST, NUM_TRAIN, SIZE, tiny_config, write_synthetic
from tests.support.sample_images import with_uris

cluster = pytest.mark.cluster


def test_the_warm_rate_is_the_sum_of_each_actors_images_per_second() -> None:
    rows = [
        {"actor": "a", "images": 100, "started": 0.0, "finished": 1.0},
        {"actor": "a", "images": 100, "started": 3.0, "finished": 4.0},
        {"actor": "b", "images": 60, "started": 10.0, "finished": 12.0},
        {"actor": "", "images": 500, "started": 0.0, "finished": 0.0},  # kept of an earlier job
    ]
    assert warm_rate(rows) == pytest.approx(200 / 4 + 60 / 2)
    assert warm_rate(rows[3:]) == 0


def test_the_key_of_a_part_changes_with_each_of_its_inputs(
    synthetic: GeoDataset,
) -> None:
    table = synthetic.table("queries", ["train"])
    five = table.take(np.arange(5))
    six = table.take(np.arange(6))
    later = table.take(np.arange(1, 6))
    turned = dataclasses.replace(five, headings=np.full(5, 90.0, dtype=np.float32))
    moved = with_uris(five, {4: Path("elsewhere.png")})
    ranged = dataclasses.replace(five, offsets=np.array([-1, -1, -1, -1, 512]))
    changed = (five, six, turned, moved, ranged, later)
    keys = {part_key("job", "queries", part) for part in changed}
    keys.add(part_key("job", "references", five))
    keys.add(part_key("another", "queries", five))
    assert len(keys) == 8
    read_again = synthetic.table("queries", ["train"]).take(np.arange(5))
    assert part_key("job", "queries", read_again) in keys


@dataclass
class Case:
    """Checkpoints of two encoders, and a pool of two actors that all tests share."""

    config: RunConfig
    dataset: GeoDataset
    folder: Path
    pool: EncoderPool
    gate: PlacementGate
    encoders: dict[str, Encoder]
    reports: list[EmbeddingReport] = field(default_factory=list)

    def embed(
        self, target: str, checkpoint: str = "one", config: RunConfig | None = None, **options: Any
    ) -> Any:
        config = config or self.config
        uri = str(self.folder / checkpoint)
        stamp = checkpoint_stamp(config, self.encoders[checkpoint], uri, self.dataset.fingerprint)
        arguments: dict[str, Any] = {
            "splits": ["train", "test"],
            "numerics": Numerics(),
            "stamp": stamp,
            **options,
        }
        return embed(self.pool, config, self.dataset, uri, str(self.folder / target), **arguments)

    def names(self) -> list[str]:
        """Return the names of the actors' processes."""
        return [ray.get(actor.name.remote()) for actor in self.pool.actors]

    def kill_one(self, number: int) -> None:
        os.kill(int(self.names()[number].split(":")[1]), signal.SIGKILL)

    def check(self, target: str, checkpoint: str = "one") -> None:
        """Check that the table holds the embeddings that the encoder gives image by image."""
        for view in ("queries", "references"):
            found = read_embeddings(str(self.folder / target), view)
            table = self.dataset.table(view, ["train", "test"])
            assert sorted(found.ids.tolist()) == table.ids.tolist()
            order = np.argsort(found.ids)
            assert found.place_ids[order].tolist() == table.place_ids.tolist()
            rows = range(len(table))
            images = torch.stack(
                [load_view(table, row, view, self.config.data, seed=3) for row in rows]
            )
            with torch.inference_mode():
                wanted = torch.nn.functional.normalize(
                    self.encoders[checkpoint].eval().embed(images, view)
                ).numpy()
            np.testing.assert_allclose(found.vectors[order], wanted, atol=1e-5)


@pytest.fixture(scope="module")
def case(
    ray_cluster: None, synthetic: GeoDataset, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("embedding")
    config = tiny_config(
        folder / "run", synthetic.uri, embedding={"part_rows": 10, "num_actors": 2, "batch_size": 4}
    )
    encoders = {
        name: Encoder.build(config.model, seed=seed) for name, seed in (("one", 1), ("two", 2))
    }
    for name, encoder in encoders.items():
        save_checkpoint(str(folder / name), encoder, None, epoch=1, step=7)
    timeout_s = config.ray.start_timeout_s
    with (
        PlacementGate(releases=True) as gate,
        EncoderPool(config.model, config.placed_embedding, timeout_s, gate) as pool,
    ):
        ray.get(gate.actor.open.remote())
        assert pool.actors == ()  # none until a job needs them
        yield Case(config, synthetic, folder, pool, gate, encoders)


@cluster
def test_actors_stay_from_job_to_job_and_read_weights_only_when_they_change(case: Case) -> None:
    first = case.embed("a")
    names = case.names()
    num_parts = 2 * -(-(NUM_TRAIN + NUM_TEST) // 10)
    assert first.images == 2 * (NUM_TRAIN + NUM_TEST)
    assert first.bad_images == ()
    assert first.reused_parts == 0
    assert first.warm_images_per_s > 0
    case.check("a")
    weights = case.folder / "one" / WEIGHTS
    shutil.move(weights, case.folder / "kept")  # loaded weights are not read again
    second = case.embed("b")
    case.check("b")
    assert case.embed("a").reused_parts == 0  # a published table is replaced
    shutil.move(case.folder / "kept", weights)
    case.embed("c", "two")
    case.check("c", "two")
    case.embed("d", "one")
    case.check("d", "one")
    assert len(set(names)) == 2
    assert case.names() == names
    assert second.seconds < first.seconds
    assert len(open_published(str(case.folder / "a"), "embeddings").parts) == num_parts


@cluster
def test_a_job_whose_actors_make_room_for_workers_goes_on_with_new_ones(case: Case) -> None:
    waited: list[float] = []

    def reopen() -> None:
        time.sleep(0.5)
        waited.append(time.monotonic())
        ray.get(case.gate.actor.open.remote())

    before: list[str] = []
    reopening = threading.Thread(target=reopen)

    def close(done: int, total: int) -> None:
        if not before and done >= 30:
            before.extend(case.names())
            ray.get(case.gate.actor.close.remote())
            reopening.start()

    report = case.embed("released", on_progress=close)
    ended = time.monotonic()
    case.check("released")
    assert len(before) == 2
    assert not set(before) & set(case.names())
    assert waited[0] < ended
    assert report.reused_parts >= 3


@cluster
def test_an_actor_without_gpu_memory_ends_the_job_at_once_with_a_remedy(case: Case) -> None:
    with pytest.raises(
        GpuMemoryError,
        match=r"no GPU memory for a batch of 4 images: lower embedding\.batch_size, .*raise"
        r" embedding\.gpus_per_actor, .*torch says: CUDA out of memory\. Tried to allocate 2\.00",
    ):
        case.embed("full", numerics=FullGpu())
    assert not is_published(str(case.folder / "full"))


@dataclass(frozen=True)
class FullGpu(Numerics):
    """Numerics whose passes find no memory, as torch says it."""

    def embed(self, encoder: Encoder, images: torch.Tensor, view: View) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


class StopError(Exception):
    """Raised by a test to stop a job."""


def interrupt(case: Case, target: str, after: int, **options: Any) -> list[Path]:
    """Stop the driver of a job after so many images; return the commits after its tasks end."""

    def stop(done: int, total: int) -> None:
        if done >= after:
            raise StopError

    with pytest.raises(StopError):
        case.embed(target, on_progress=stop, **options)
    folder = case.folder / target / "_work"
    num_before = -1
    commits: list[Path] = []
    while len(commits) != num_before:  # running tasks may still commit their part
        num_before = len(commits)
        time.sleep(1)
        commits = sorted(folder.rglob("*.json"))
    assert not is_published(str(case.folder / target))
    return commits


@cluster
def test_a_restarted_job_keeps_the_committed_parts_that_are_undamaged(case: Case) -> None:
    commits = interrupt(case, "e", 60)
    folder = case.folder / "e"
    assert 2 < len(commits) < 24
    parts = [folder / json.loads(path.read_text())["outcome"]["part"]["name"] for path in commits]
    parts[0].write_bytes(parts[0].read_bytes()[:-1] + b"?")
    parts[1].unlink()
    kept = {path: path.stat().st_mtime_ns for path in parts[2:]}
    (folder / "references/part-00099.parquet").write_bytes(b"of a job with smaller parts")
    report = case.embed("e")
    assert report.reused_parts == len(commits) - 2
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    case.check("e")
    published = {part.name for part in open_published(str(folder), "embeddings").parts}
    present = {str(path.relative_to(folder)) for path in folder.rglob("*.parquet")}
    assert present == published
    assert not (folder / "_work").exists()


@cluster
def test_commits_of_another_checkpoint_and_of_other_parts_are_not_kept(case: Case) -> None:
    interrupt(case, "f", 60)
    assert case.embed("f", "two").reused_parts == 0
    case.check("f", "two")
    interrupt(case, "g", 60)
    smaller = case.config.model_copy(
        update={"embedding": case.config.embedding.model_copy(update={"part_rows": 9})}
    )
    assert case.embed("g", config=smaller).reused_parts == 0
    case.check("g")
    interrupt(case, "h", 60)
    assert case.embed("h", numerics=Numerics(channels_last=True)).reused_parts == 0


@cluster
@pytest.mark.parametrize("seed", [1, 2])
def test_a_killed_actor_is_restarted_and_no_image_is_lost(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_images = int(rng.integers(1, 12)) * 10
    number = int(rng.integers(2))
    with case.pool.job():
        names = case.names()
    killed: list[int] = []

    def kill(done: int, total: int) -> None:
        if done >= num_images and not killed:
            killed.append(done)
            case.kill_one(number)

    target = f"k{seed}"
    report = case.embed(target, on_progress=kill)
    assert killed
    assert report.images == 2 * (NUM_TRAIN + NUM_TEST)
    case.check(target)
    assert sum(a != b for a, b in zip(names, case.names(), strict=True)) == 1


@cluster
def test_a_restarted_job_lists_skipped_images_again(case: Case, tmp_path: Path) -> None:
    dataset = write_synthetic(tmp_path / "damaged")
    (tmp_path / "damaged/images/queries/5.png").write_bytes(b"\x89PNG nothing")
    data = case.config.data.model_copy(update={"uri": dataset.uri, "on_bad_image": "skip"})
    damaged = dataclasses.replace(
        case, dataset=dataset, config=case.config.model_copy(update={"data": data})
    )
    one_view: dict[str, Any] = {"views": ["queries"], "splits": ["train"]}
    interrupt(damaged, "left", 60, **one_view)
    report = damaged.embed("left", **one_view)
    assert report.reused_parts > 0
    (reason,) = report.bad_images
    assert reason.startswith("id 5, ")
    assert open_published(str(case.folder / "left"), "embeddings").info["bad_images"] == [reason]
    interrupt(damaged, "none", 60, **one_view)
    failing = damaged.config.model_copy(
        update={"data": data.model_copy(update={"on_bad_image": "fail"})}
    )
    with pytest.raises(
        BadImageError, match=r"^id 5, .*; fix the image, or set data.on_bad_image=skip$"
    ):
        damaged.embed("none", config=failing, **one_view)


class Busy:
    """An actor that holds a number of parts; a negative number: does not answer."""

    def __init__(self, parts: int) -> None:
        self.parts = parts

    def num_parts(self) -> int:
        if self.parts < 0:
            time.sleep(600)
        return self.parts


@cluster
def test_a_part_goes_to_the_actor_with_the_fewest_parts_and_in_turn_among_equals(
    ray_cluster: None,
) -> None:
    options: dict[str, Any] = {"num_cpus": 0, "concurrency_groups": {"status": 1}}
    actor: Any = ray.remote(**options)(Busy)
    slow, a, b, silent = (actor.remote(parts) for parts in (2, 0, 0, -1))
    ray.get([one.__ray_ready__.remote() for one in (slow, a, b, silent)])
    assert [find_least_loaded([slow, a, b], number) for number in range(4)] == [a, a, b, a]
    assert [find_least_loaded([slow, silent], number) for number in range(2)] == [slow, slow]
    assert find_least_loaded([silent], 3) is silent
    for one in (slow, a, b, silent):
        ray.kill(one)


@cluster
def test_actors_without_room_raise_an_error_with_their_needs(
    ray_cluster: None, tmp_path: Path
) -> None:
    config = tiny_config(
        tmp_path,
        "d",
        embedding={"num_actors": 2, "label_selector": {"zone": "mars"}},
        ray={"start_timeout_s": 1},
    )
    message = (
        r"^2 of 2 embedding actors did not start within 1 s: each asks for 0\.25 CPUs and a node of"
        r" embedding\.label_selector=\{'zone': 'mars'\}; the cluster has [\d.]+ CPUs and"
        r" 0 GPUs free; the labels of its nodes are \{.*\}; ask for less"
    )
    with EncoderPool(config.model, config.placed_embedding, config.ray.start_timeout_s) as pool:
        for _ in range(2):
            with pytest.raises(RunError, match=message), pool.job():
                pass
    options: dict[str, Any] = {
        "label_selector": {"zone": "mars"},
        "concurrency_groups": {"encode": 1, "status": 1},
    }
    actor: Any = ray.remote(**options)(EncoderActor)
    gone = actor.remote(config.model, 1, False)
    encoding = Encoding("c", "w", Numerics(), str(tmp_path), 4, "float32")
    images = np.zeros((1, 3, SIZE, SIZE), np.uint8)
    pixels = Pixels(
        "queries/part-00000.parquet",
        "queries",
        np.zeros(1, np.int64),
        np.zeros(1, np.int64),
        images,
    )
    with pytest.raises(
        RunError, match=r"an embedding actor died, and did not start again within 0\.5 s"
    ):
        encode_part_on(gone, encoding, pixels, timeout_s=0.5)
    ray.kill(gone)
