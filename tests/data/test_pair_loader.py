from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from s4g_ray.config.schema import DataConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.images import fit_reference, load_raw
from s4g_ray.data.pair_loader import PairBatch, PairLoader
from s4g_ray.errors import BadImageError, DeadProcessError
from tests.conftest import NUM_TRAIN, SIZE
from tests.support.sample_images import config, loader

IDS = np.arange(12).reshape(3, 4)
GALLERY = np.array([[96, -1], [97, 98], [3, 99]])


@pytest.fixture(scope="module")
def processes(synthetic: GeoDataset) -> Iterator[PairLoader]:
    """One loader of two processes for many epochs and tests, as in a run."""
    with loader(synthetic, num_processes=2, on_bad_image="skip") as made:
        yield made


def assert_same(found: list[PairBatch], wanted: list[PairBatch]) -> None:
    assert [batch.number for batch in found] == [batch.number for batch in wanted]
    for a, b in zip(found, wanted, strict=True):
        assert a.bad_images == b.bad_images
        for name in (
            "query_ids",
            "queries",
            "references",
            "valid",
            "gallery",
            "gallery_ids",
            "gallery_valid",
        ):
            one, other = getattr(a, name), getattr(b, name)
            assert (one is None and other is None) or bool((one == other).all()), name


def test_a_pair_looks_the_same_whatever_shares_its_batch_and_other_in_another_epoch(
    synthetic: GeoDataset,
) -> None:
    one = list(loader(synthetic).load(IDS, IDS, epoch=2))
    halves = list(loader(synthetic).load(IDS[:, 2:], IDS[:, 2:], epoch=2))
    other = list(loader(synthetic).load(IDS, IDS, epoch=3))
    for a, half, c in zip(one, halves, other, strict=True):
        assert torch.equal(a.references[2:], half.references)
        assert torch.equal(a.queries[2:], half.queries)
        assert not torch.equal(a.queries, c.queries)
    assert [batch.number for batch in one] == [0, 1, 2]


def test_batches_are_the_same_for_every_number_of_processes_and_every_first(
    synthetic: GeoDataset, processes: PairLoader
) -> None:
    wanted = list(loader(synthetic).load(IDS, IDS, epoch=2, gallery_ids=GALLERY))
    assert_same(list(processes.load(IDS, IDS, epoch=2, gallery_ids=GALLERY)), wanted)
    with loader(synthetic, num_processes=1) as one:
        assert_same(list(one.load(IDS, IDS, epoch=2, gallery_ids=GALLERY)), wanted)
    for source in (loader(synthetic), processes):
        assert_same(list(source.load(IDS, IDS, epoch=2, gallery_ids=GALLERY, first=1)), wanted[1:])
        assert list(source.load(IDS, IDS, epoch=2, first=3)) == []


def test_a_load_after_one_left_unfinished_is_of_its_own_plan(
    synthetic: GeoDataset, processes: PairLoader
) -> None:
    many = np.random.default_rng(0).integers(0, NUM_TRAIN, (40, 4))
    for source in (loader(synthetic), processes):
        for epoch in (1, 2, 3):
            left = source.load(many, many, epoch=9)
            assert next(left).number == 0
            wanted = list(loader(synthetic).load(IDS[::-1], IDS[::-1], epoch=epoch))
            assert_same(list(source.load(IDS[::-1], IDS[::-1], epoch=epoch)), wanted)
    with pytest.raises(RuntimeError, match="after the next had begun"):
        next(left)


def test_empty_slots_are_blank_and_masked_but_not_counted_as_bad(
    synthetic: GeoDataset, processes: PairLoader
) -> None:
    holes = IDS.copy()
    holes[0, 1] = holes[1, 3] = holes[2] = -1
    whole = list(loader(synthetic).load(IDS, IDS, epoch=1))
    for source in (loader(synthetic), processes):
        for batch, full in zip(source.load(holes, holes, epoch=1), whole, strict=True):
            filled = torch.from_numpy(batch.query_ids >= 0)
            assert torch.equal(batch.valid, filled)
            assert torch.equal(batch.queries[filled], full.queries[filled])
            assert torch.equal(batch.references[filled], full.references[filled])
            assert not batch.queries[~filled].any()
            assert not batch.references[~filled].any()
            assert (batch.bad_images, batch.pairs_masked) == ((), 0)


def test_an_unknown_id_is_named(synthetic: GeoDataset, processes: PairLoader) -> None:
    unknown = np.array([[0, 777]])
    for source in (loader(synthetic), processes):
        with pytest.raises(KeyError, match="777"):
            list(source.load(unknown, unknown, epoch=1))


def test_loading_draws_nothing_from_the_process_that_trains(processes: PairLoader) -> None:
    """Or a model with dropout would depend on the number of loader processes."""
    before = torch.get_rng_state()
    list(processes.load(IDS, IDS, epoch=1))
    assert torch.equal(torch.get_rng_state(), before)


def damage(made: PairLoader, folder: Path) -> None:
    """Query 2 is broken, reference 5 is missing."""
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n")
    made.queries.uris[2], made.references.uris[5] = (
        str(folder / "broken.png"),
        str(folder / "none.png"),
    )


@pytest.mark.parametrize("threads", [True, False])
def test_batches_that_are_loaded_and_not_taken_are_counted(
    synthetic: GeoDataset, processes: PairLoader, threads: bool
) -> None:
    with loader(synthetic) as of_threads:
        made = of_threads if threads else processes
        load = made.load(IDS, IDS, epoch=5)
        next(load)
        deadline = time.monotonic() + 60
        while made.num_ready < 2:  # all that are left
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert next(load).number == 1
        assert made.num_ready == 1
        list(load)
        assert made.num_ready == 0


@pytest.mark.parametrize("num_processes", [0, 1])
def test_a_corrupt_image_fails_by_name_or_masks_its_pair(
    synthetic: GeoDataset, tmp_path: Path, num_processes: int
) -> None:
    with loader(synthetic, num_processes=num_processes) as made:
        damage(made, tmp_path)
        with pytest.raises(
            BadImageError, match=r"^id 2, .*broken\.png: not an image file of a known format$"
        ):
            list(made.load(IDS, IDS, epoch=1))
        with pytest.raises(BadImageError, match=r"^id 5, .*none\.png: FileNotFoundError: "):
            list(made.load(IDS[1:], IDS[1:], epoch=1))
        assert [batch.number for batch in made.load(IDS[2:], IDS[2:], epoch=1)] == [0]


def test_skipped_images_are_counted_and_listed(
    synthetic: GeoDataset, processes: PairLoader, tmp_path: Path
) -> None:
    uris = processes.queries.uris.copy(), processes.references.uris.copy()
    made = loader(synthetic, on_bad_image="skip")
    damage(made, tmp_path)
    damage(processes, tmp_path)
    batches = list(made.load(IDS, IDS, epoch=1))
    assert_same(list(processes.load(IDS, IDS, epoch=1)), batches)
    assert [batch.valid.tolist() for batch in batches[:2]] == [
        [True, True, False, True],
        [True, False, True, True],
    ]
    assert [batch.pairs_masked for batch in batches] == [1, 1, 0]
    assert "broken.png" in batches[0].bad_images[0]
    assert "FileNotFoundError" in batches[1].bad_images[0]
    processes.queries.uris[:], processes.references.uris[:] = uris


def test_a_killed_loader_process_is_a_run_error_and_the_others_end(synthetic: GeoDataset) -> None:
    many = np.tile(IDS, (50, 1))
    with loader(synthetic, num_processes=2) as made:
        batches = made.load(many, many, epoch=1)
        next(batches)
        pids = made.process_ids
        os.kill(pids[0], signal.SIGKILL)
        started = time.perf_counter()
        with pytest.raises(
            DeadProcessError,
            match=rf"loader process {pids[0]} died with exit code -9; .*loader_processes",
        ):
            list(batches)
        assert time.perf_counter() - started < 30
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in pids)


def test_a_training_panorama_is_cropped_after_it_rolled_with_its_tile(
    synthetic: GeoDataset,
) -> None:
    turn = config(rotate="panorama", rotate_probability=1.0)
    made = loader(synthetic, augment=turn, query_fov_deg=90)
    cfg = DataConfig(uri="x", query_size=(SIZE, SIZE), reference_size=(SIZE, SIZE))
    (batch,) = made.load(IDS[:1], IDS[:1], epoch=1)
    assert tuple(batch.queries.shape) == (4, 3, SIZE, SIZE // 4)
    for row in range(4):
        whole, tile = (
            load_raw(made.queries, row),
            fit_reference(load_raw(made.references, row), cfg),
        )
        turns = [
            k
            for k in (1, 2, 3)
            if torch.equal(torch.rot90(tile, k, (-2, -1)), batch.references[row])
        ]
        assert len(turns) == 1
        rolled = torch.roll(whole, -turns[0] * SIZE // 4, -1)
        assert torch.equal(batch.queries[row], rolled[..., SIZE * 3 // 8 : SIZE * 5 // 8])


class Worker:
    """An actor that loads, as a training worker does."""

    def __init__(self, dataset: GeoDataset) -> None:
        self.loader = loader(dataset, num_processes=2)

    def load(self, ids: NDArray[np.int64], epoch: int) -> tuple[list[PairBatch], list[int]]:
        return list(self.loader.load(ids, ids, epoch=epoch)), self.loader.process_ids


@pytest.mark.cluster
def test_processes_of_an_actor_load_plan_after_plan_and_end_with_it(
    synthetic: GeoDataset, ray_cluster: None
) -> None:
    import ray

    actor: Any = ray.remote(Worker).options(num_cpus=0.5).remote(synthetic)
    pids: list[int] = []
    for epoch, ids in ((1, IDS), (2, IDS[:, ::-1] + 20)):
        batches, found = ray.get(actor.load.remote(ids, epoch))
        assert_same(batches, list(loader(synthetic).load(ids, ids, epoch=epoch)))
        assert pids in ([], found)
        pids = found
    ray.kill(actor)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/exe").exists() for pid in pids):
        assert time.monotonic() < deadline, "loader processes outlive their actor"
        time.sleep(0.2)
