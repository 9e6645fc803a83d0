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
from torch import Tensor

from s4g_ray.config.data_schema import DataConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.images import fit_reference, load_raw
from s4g_ray.data.pair_loader import PairBatch, PairLoader
from s4g_ray.errors import BadImageError, DeadProcessError
from tests.conftest import NUM_TRAIN, SIZE
from tests.support.sample_images import augment_config, loader, with_uris

IDS = np.arange(12).reshape(3, 4)
GALLERY = np.array([[96, -1], [97, 98], [3, 99]])
# References of the test split, four a batch.
FULL_GALLERY = np.array([[96, 97, 98, 99], [100, 96, 102, 103], [104, 105, -1, 96]])


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
            one = getattr(a, name)
            other = getattr(b, name)
            assert (one is None and other is None) or bool((one == other).all()), name


def test_a_pair_is_augmented_alike_in_any_batch_and_anew_each_epoch(
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


def test_a_load_after_an_unfinished_one_gives_batches_of_its_own_plan(
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


def test_an_unknown_id_is_an_error_that_names_it(
    synthetic: GeoDataset, processes: PairLoader
) -> None:
    unknown = np.array([[0, 777]])
    for source in (loader(synthetic), processes):
        with pytest.raises(KeyError, match="777"):
            list(source.load(unknown, unknown, epoch=1))


def test_loading_draws_nothing_from_the_process_that_trains(processes: PairLoader) -> None:
    """Otherwise a model with dropout would depend on the number of loader processes."""
    before = torch.get_rng_state()
    list(processes.load(IDS, IDS, epoch=1))
    assert torch.equal(torch.get_rng_state(), before)


def damage(made: PairLoader, folder: Path) -> None:
    """Break query 2 and point reference 5 at a missing file."""
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n")
    made.queries = with_uris(made.queries, {2: folder / "broken.png"})
    made.references = with_uris(made.references, {5: folder / "none.png"})


@pytest.mark.parametrize("threads", [True, False])
def test_batches_that_are_loaded_but_not_taken_are_counted(
    synthetic: GeoDataset, processes: PairLoader, threads: bool
) -> None:
    with loader(synthetic) as of_threads:
        made = of_threads if threads else processes
        load = made.load(IDS, IDS, epoch=5)
        next(load)
        deadline = time.monotonic() + 60
        while made.num_ready < 2:  # all that remain
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
    queries = processes.queries
    references = processes.references
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
    processes.queries = queries
    processes.references = references


def test_a_killed_loader_process_is_an_error_with_its_id_and_the_others_end(
    synthetic: GeoDataset,
) -> None:
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
        assert time.perf_counter() - started < 60
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in pids)


def test_a_training_panorama_is_cropped_after_it_is_rolled_with_its_tile(
    synthetic: GeoDataset,
) -> None:
    turn = augment_config(rotate="panorama", rotate_probability=1.0)
    made = loader(synthetic, augment=turn, query_fov_deg=90)
    cfg = DataConfig(uri="x", query_size=(SIZE, SIZE), reference_size=(SIZE, SIZE))
    (batch,) = made.load(IDS[:1], IDS[:1], epoch=1)
    assert tuple(batch.queries.shape) == (4, 3, SIZE, SIZE // 4)
    for row in range(4):
        whole = load_raw(made.queries, row)
        tile = fit_reference(load_raw(made.references, row), cfg)
        turns = [
            k
            for k in (1, 2, 3)
            if torch.equal(torch.rot90(tile, k, (-2, -1)), batch.references[row])
        ]
        assert len(turns) == 1
        rolled = torch.roll(whole, -turns[0] * SIZE // 4, -1)
        assert torch.equal(batch.queries[row], rolled[..., SIZE * 3 // 8 : SIZE * 5 // 8])


def test_a_field_of_view_of_a_range_depends_on_seed_epoch_and_query_alone(
    synthetic: GeoDataset,
) -> None:
    view: dict[str, Any] = {"query_heading": "random", "query_fov_deg": [90, 360]}

    def load(ids: NDArray[np.int64], epoch: int, **keys: Any) -> list[PairBatch]:
        made = loader(synthetic, augment=augment_config(), **{**view, **keys})
        return list(made.load(ids, ids, epoch=epoch))

    def widths_of(batches: list[PairBatch]) -> list[int]:
        columns = torch.cat([batch.queries for batch in batches]).amax((1, 2))
        return (columns > 0).sum(1).tolist()

    whole = load(IDS, 2)
    halves = load(IDS[:, 2:], 2)
    for batch, half in zip(whole, halves, strict=True):
        assert torch.equal(batch.queries[2:], half.queries)
    assert min(widths_of(whole)) >= SIZE // 4
    assert len(set(widths_of(whole))) > 4
    assert widths_of(whole) != widths_of(load(IDS, 3))
    # turned as without a range, then black beside the middle
    for batch, full in zip(whole, load(IDS, 2, query_fov_deg=360), strict=True):
        for seen, panorama in zip(batch.queries, full.queries, strict=True):
            is_seen = seen.amax((0, 1)) > 0
            assert torch.equal(seen[..., is_seen], panorama[..., is_seen])
            assert bool(is_seen[SIZE // 2])


def gallery_of(batch: PairBatch) -> Tensor:
    assert batch.gallery is not None
    return batch.gallery


def test_a_gallery_image_is_augmented_alike_in_any_batch_and_anew_each_epoch(
    synthetic: GeoDataset,
) -> None:
    one = list(loader(synthetic).load(IDS, IDS, epoch=2, gallery_ids=FULL_GALLERY))
    halves = list(
        loader(synthetic).load(IDS[:, 2:], IDS[:, 2:], epoch=2, gallery_ids=FULL_GALLERY[:, 2:])
    )
    other = list(loader(synthetic).load(IDS, IDS, epoch=3, gallery_ids=FULL_GALLERY))
    for a, half, c in zip(one, halves, other, strict=True):
        assert gallery_of(a).shape == (4, 3, SIZE, SIZE)
        assert torch.equal(gallery_of(a)[2:], gallery_of(half))
        assert not torch.equal(gallery_of(a), gallery_of(c))
    assert torch.equal(gallery_of(one[0])[0], gallery_of(one[1])[1])  # the same image


def test_pairs_are_the_same_with_and_without_gallery_images(synthetic: GeoDataset) -> None:
    with_gallery = list(loader(synthetic).load(IDS, IDS, epoch=1, gallery_ids=FULL_GALLERY))
    without = list(loader(synthetic).load(IDS, IDS, epoch=1))
    for a, b in zip(with_gallery, without, strict=True):
        assert torch.equal(a.queries, b.queries)
        assert torch.equal(a.references, b.references)
        assert (b.gallery, b.gallery_ids, b.gallery_valid, b.gallery_masked) == (
            None,
            None,
            None,
            0,
        )


def test_a_gallery_image_has_random_draws_of_its_own(synthetic: GeoDataset) -> None:
    """A reference with the id of a query in the batch must not repeat that pair's augmentation."""
    (batch,) = loader(synthetic).load(IDS[:1], IDS[:1], epoch=1, gallery_ids=IDS[:1])
    assert all(not torch.equal(gallery_of(batch)[i], batch.references[i]) for i in range(4))


def test_an_empty_gallery_slot_is_masked_and_a_corrupt_image_fails_by_name_or_is_listed(
    synthetic: GeoDataset, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n")
    ids = np.array([[NUM_TRAIN, -1, NUM_TRAIN + 5, NUM_TRAIN + 6]])

    def load(mode: str) -> list[PairBatch]:
        made = loader(synthetic, on_bad_image=mode)
        made.references = with_uris(made.references, {NUM_TRAIN + 5: broken})
        return list(made.load(IDS[:1], IDS[:1], epoch=1, gallery_ids=ids))

    with pytest.raises(BadImageError, match=rf"id {NUM_TRAIN + 5}, .*broken\.png"):
        load("fail")
    (batch,) = load("skip")
    assert batch.gallery_valid is not None
    assert batch.gallery_valid.tolist() == [True, False, False, True]
    assert batch.valid.all()
    assert [bool(image.any()) for image in gallery_of(batch)] == [True, False, False, True]
    assert batch.gallery_masked == 1
    assert len(batch.bad_images) == 1
    assert "broken.png" in batch.bad_images[0]
    with pytest.raises(KeyError, match="777"):
        list(loader(synthetic).load(IDS[:1], IDS[:1], epoch=1, gallery_ids=np.array([[777]])))


def test_without_augmentation_a_gallery_image_is_the_stored_one(synthetic: GeoDataset) -> None:
    made = loader(synthetic, augment=augment_config())
    (batch,) = made.load(IDS[:1], IDS[:1], epoch=1, gallery_ids=FULL_GALLERY[:1])
    for i, row in enumerate(FULL_GALLERY[0].tolist()):
        assert torch.equal(gallery_of(batch)[i], load_raw(made.references, row))


class Worker:
    """An actor that loads batches, as a training worker does."""

    def __init__(self, dataset: GeoDataset) -> None:
        self.loader = loader(dataset, num_processes=2)

    def load(self, ids: NDArray[np.int64], epoch: int) -> tuple[list[PairBatch], list[int]]:
        return list(self.loader.load(ids, ids, epoch=epoch)), self.loader.process_ids


@pytest.mark.cluster
def test_loader_processes_of_an_actor_load_plan_after_plan_and_end_with_it(
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
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/exe").exists() for pid in pids):
        assert time.monotonic() < deadline, "loader processes outlive their actor"
        time.sleep(0.2)
