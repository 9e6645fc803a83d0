"""Embedding jobs on a cluster: actors, parts kept from an interrupted job, skipped images."""

from __future__ import annotations

import dataclasses
import json
import os
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

from s4g_ray.config.loading import override_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.images import load_view
from s4g_ray.data.tables.embedding_table import read_embeddings
from s4g_ray.distributed.placement_gate import PlacementGate
from s4g_ray.encoder.actors import EncoderPool
from s4g_ray.encoder.checkpoint import checkpoint_stamp, save_checkpoint
from s4g_ray.encoder.embedding.outcomes import BlockResult, Written
from s4g_ray.encoder.embedding.report import EmbeddingReport, warm_rate
from s4g_ray.encoder.embedding_job import embed
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.errors import BadImageError, RunError
from s4g_ray.freed_memory import VARIABLES
from s4g_ray.storage.manifest import is_published, open_published
from tests.conftest import NUM_TEST, NUM_TRAIN, tiny_config, write_synthetic

cluster = pytest.mark.cluster
PART_MB = 0.0109  # 40 rows of 64 values in float32
NUM_PARTS = 3  # of 120 images of a view
SMALL = {"part_mb": PART_MB, "batch_size": 2, "dtype": "float32"}  # blocks of 14 and 12 images


def test_the_warm_rate_is_the_sum_of_each_actors_images_per_second() -> None:
    def result(actor: str, images: int, started: float, finished: float) -> BlockResult:
        return BlockResult(Written(None), images, actor, started, finished, reused=not actor)

    results = [
        result("a", 100, 0.0, 1.0),
        result("a", 100, 3.0, 4.0),
        result("b", 60, 10.0, 12.0),
        result("", 500, 0.0, 0.0),  # kept of an earlier job
    ]
    assert warm_rate(results) == pytest.approx(200 / 4 + 60 / 2)
    assert warm_rate(results[3:]) == 0


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
            order = np.lexsort((table.ids, table.place_ids))
            assert found.ids.tolist() == table.ids[order].tolist()
            assert found.place_ids.tolist() == table.place_ids[order].tolist()
            rows = range(len(table))
            images = torch.stack(
                [load_view(table, row, view, self.config.data, seed=3) for row in rows]
            )
            with torch.inference_mode():
                wanted = torch.nn.functional.normalize(
                    self.encoders[checkpoint].eval().embed(images, view)
                ).numpy()
            np.testing.assert_allclose(found.vectors, wanted[order], atol=1e-5)


@pytest.fixture(scope="module")
def case(
    ray_cluster: None, synthetic: GeoDataset, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("embedding")
    config = tiny_config(folder / "run", synthetic.uri, embedding={**SMALL, "num_actors": 2})
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
def test_actors_stay_from_job_to_job_and_the_bits_do_not_depend_on_them(
    case: Case, malloc_not_chosen: None
) -> None:
    shown: list[int] = []
    first = case.embed("a", on_progress=lambda done, total: shown.append(done))
    names = case.names()
    assert first.images == 2 * (NUM_TRAIN + NUM_TEST) == shown[-1]
    assert shown == sorted(shown)
    assert first.bad_images == ()
    assert first.reused_parts == 0
    assert first.warm_images_per_s > 0
    case.check("a")
    found = open_published(str(case.folder / "a"), "embeddings")
    assert found.info["place_order"]
    assert len(found.parts) == 2 * NUM_PARTS
    assert sorted(part.name for part in found.parts) == [part.name for part in found.parts]
    second = case.embed("a", "two")  # a published table is replaced
    case.check("a", "two")
    assert len(set(names)) == 2
    assert case.names() == names
    assert second.seconds < first.seconds
    alone = override_config(case.config, ["embedding.num_actors=1"])
    with EncoderPool(alone.model, alone.placed_embedding, 60) as pool:
        dataclasses.replace(case, pool=pool, config=alone).embed("b")
        variables = pool.actors[0].__ray_call__.remote(lambda _: dict(os.environ))
        assert VARIABLES.items() <= ray.get(variables).items()
    assert open_published(str(case.folder / "b"), "embeddings").parts == found.parts


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
    assert report.images == 2 * (NUM_TRAIN + NUM_TEST)


class StopError(Exception):
    """Raised by a test to stop a job."""


def interrupt(case: Case, target: str, num_parts: int, **options: Any) -> list[Path]:
    """Stop the driver of a job when so many parts are committed; return the commits of parts."""
    folder = case.folder / target / "_work"

    def stop(done: int, total: int) -> None:
        if len(list(folder.glob("*/*.json"))) >= num_parts:
            raise StopError

    with pytest.raises(StopError):
        case.embed(target, on_progress=stop, **options)
    assert not is_published(str(case.folder / target))
    return sorted(folder.glob("*/*.json"))


@cluster
def test_a_restarted_job_keeps_parts_and_blocks_that_are_undamaged(case: Case) -> None:
    commits = interrupt(case, "e", 3)
    folder = case.folder / "e"
    blocks = {path: path.stat().st_mtime_ns for path in folder.glob("_work/*/*/*.json")}
    time.sleep(0.3)
    assert blocks == {path: path.stat().st_mtime_ns for path in folder.glob("_work/*/*/*.json")}
    assert 2 < len(commits) < 2 * NUM_PARTS
    parts = [folder / json.loads(path.read_text())["outcome"]["part"]["name"] for path in commits]
    parts[0].write_bytes(parts[0].read_bytes()[:-1] + b"?")
    parts[1].unlink()
    kept = {path: path.stat().st_mtime_ns for path in parts[2:]}
    (folder / "references/part-00099.parquet").write_bytes(b"of a job with smaller parts")
    report = case.embed("e")
    assert report.reused_parts == len(kept) > 0
    assert report.reused_images >= 40 * len(kept)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    case.check("e")
    published = {part.name for part in open_published(str(folder), "embeddings").parts}
    present = {str(path.relative_to(folder)) for path in folder.rglob("*.parquet")}
    assert present == published
    assert not (folder / "_work").exists()


@cluster
def test_commits_of_another_checkpoint_and_of_other_parts_are_not_kept(case: Case) -> None:
    interrupt(case, "f", 2)
    found = case.embed("f", "two")
    assert (found.reused_parts, found.reused_images) == (0, 0)
    case.check("f", "two")
    interrupt(case, "g", 2)
    smaller = override_config(case.config, [f"embedding.part_mb={PART_MB * 0.9}"])
    assert case.embed("g", config=smaller).reused_parts == 0
    case.check("g")


@cluster
def test_the_blocks_of_a_killed_actor_go_to_others_and_it_is_restarted(case: Case) -> None:
    with case.pool.job():
        names = case.names()
    killed: list[int] = []

    def kill(done: int, total: int) -> None:
        if done >= 30 and not killed:
            killed.append(done)
            case.kill_one(1)

    report = case.embed("killed", on_progress=kill)
    assert killed
    assert report.images == 2 * (NUM_TRAIN + NUM_TEST)
    case.check("killed")
    assert sum(a != b for a, b in zip(names, case.names(), strict=True)) == 1


@cluster
def test_a_restarted_job_lists_skipped_images_again(case: Case, tmp_path: Path) -> None:
    dataset = write_synthetic(tmp_path / "damaged")
    (tmp_path / "damaged/images/queries/5.png").write_bytes(b"\x89PNG nothing")
    skipping = override_config(case.config, [f"data.uri={dataset.uri}", "data.on_bad_image=skip"])
    damaged = dataclasses.replace(case, dataset=dataset, config=skipping)
    one_view: dict[str, Any] = {"views": ["queries"], "splits": ["train"]}
    assert interrupt(damaged, "left", 1, **one_view)
    report = damaged.embed("left", **one_view)
    assert report.reused_parts > 0
    (reason,) = report.bad_images
    assert reason.startswith("id 5, ")
    assert open_published(str(case.folder / "left"), "embeddings").info["bad_images"] == [reason]
    failing = override_config(skipping, ["data.on_bad_image=fail"])
    with pytest.raises(
        BadImageError, match=r"^id 5, .*; fix the image, or set data.on_bad_image=skip$"
    ):
        damaged.embed("none", config=failing, **one_view)


@cluster
def test_a_pool_grows_during_a_job_and_shrinks_after_it(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s4g_ray.encoder.embedding_job.GROW_EVERY_S", 0.1)
    monkeypatch.setattr("s4g_ray.encoder.actors.SPARE_CPUS", 0.0)
    elastic = override_config(case.config, ["embedding.num_actors=[1,2]"])
    seen: list[int] = []
    with EncoderPool(elastic.model, elastic.placed_embedding, 60) as pool:
        grown = dataclasses.replace(case, pool=pool, config=elastic)

        def wait_for_another(done: int, total: int) -> None:
            if len(seen) < 2 and done < total:
                # the other starts meanwhile, on a busy machine after a minute
                time.sleep(0.5 if done < total / 2 else 5)
            if len(pool.actors) not in seen:
                seen.append(len(pool.actors))

        grown.embed("grown", on_progress=wait_for_another)
        assert seen == [1, 2]
        assert len(pool.actors) == 1
    case.check("grown")


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
