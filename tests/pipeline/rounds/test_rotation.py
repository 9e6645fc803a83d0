"""Rounds that take a share of the places: which ones, and what embedding and mining are given."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from ray.exceptions import GetTimeoutError, RayTaskError

from s4g_ray.arrays import Ints
from s4g_ray.config.schema import MiningConfig
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.data.places import Places
from s4g_ray.data.train_split import TrainSplit
from s4g_ray.errors import BadImageError, GpuMemoryError, InputError, RunError, run_error_of
from s4g_ray.pipeline.preflight import check_against_dataset
from s4g_ray.pipeline.rounds.graphs import RunGraphs
from s4g_ray.pipeline.rounds.miner import Miner
from s4g_ray.pipeline.rounds.mining_round import MiningRound
from s4g_ray.pipeline.rounds.rotation import choose_places, count_shares, smallest_share
from s4g_ray.pipeline.rounds.schedule import Schedule
from s4g_ray.pipeline.run_folder import RunFolder
from s4g_ray.progress import Reporter
from s4g_ray.storage.manifest import publish
from tests.conftest import tiny_config, write_synthetic
from tests.support.embedding_tables import STAMP


def make_places(count: int, seed: int = 0) -> Places:
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(10 * count, count, replace=False))
    return Places(ids, rng.uniform(-60, 60, count), rng.uniform(-180, 180, count))


@pytest.mark.parametrize("count", [1, 3, 17, 1000, 10_007])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.3, 0.5, 1.0])
def test_each_place_is_taken_once_a_cycle_in_shares_of_nearly_one_size(
    count: int, share: float
) -> None:
    places = make_places(count)
    cfg = MiningConfig(refresh="rotate", refresh_share=share)
    num_shares = count_shares(cfg)
    assert num_shares - 1 < 1 / share <= num_shares + 1e-9
    for cycle in range(2):
        rounds = range(1 + cycle * num_shares, 1 + (cycle + 1) * num_shares)
        taken = [choose_places(places, cfg, number, seed=5) for number in rounds]
        assert np.array_equal(np.sort(np.concatenate(taken)), places.ids)
        sizes = [len(ids) for ids in taken]
        assert min(sizes) >= smallest_share(cfg, count)
        if count >= 1000:
            assert max(sizes) <= 1.02 * min(sizes) + 8
        assert all((np.diff(ids) > 0).all() for ids in taken)


def test_the_shares_depend_on_the_seed_and_the_round_alone_and_are_drawn_anew_each_cycle() -> None:
    places = make_places(400)
    cfg = MiningConfig(refresh="rotate", refresh_share=0.25)
    first = [choose_places(places, cfg, number, seed=1) for number in range(1, 9)]
    again = [choose_places(places, cfg, number, seed=1) for number in range(1, 9)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], first[4])
    assert not np.array_equal(first[0], choose_places(places, cfg, 1, seed=2))


def test_a_share_is_a_few_whole_regions() -> None:
    """Nearly all of the nearest neighbors of its places are in the same share."""
    places = make_places(4000, seed=3)
    cfg = MiningConfig(refresh="rotate", refresh_share=0.25)
    own = np.isin(places.ids, choose_places(places, cfg, 1, seed=0))
    near = places.xyz[own] @ places.xyz.T
    near[np.arange(own.sum()), np.flatnonzero(own)] = -2
    assert own[near.argmax(axis=1)].mean() > 0.85


@pytest.fixture(scope="module")
def regional(tmp_path_factory: pytest.TempPathFactory) -> GeoDataset:
    return write_synthetic(tmp_path_factory.mktemp("data") / "regional", num_gallery=30)


class Case:
    """A round of a rotating run, whose embedding and mining are recorded and not done."""

    def __init__(self, dataset: GeoDataset, folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config = tiny_config(
            folder,
            dataset.uri,
            mining={"refresh": "rotate", "refresh_share": 0.5, "every_epochs": 2},
            sampling={"gallery_negatives": 4, "gallery_splits": ["train", "gallery"]},
            train={"epochs": 9},
        )
        self.split = TrainSplit.read(self.config, dataset)
        self.folder = RunFolder.open(self.config, dataset, resume=False)
        self.graphs = RunGraphs.from_config(self.config, self.split, "f", self.folder)
        self.embedded: list[dict[str, Any]] = []
        self.mined: list[dict[str, Any]] = []
        self.built: list[Any] = []
        self.planned: list[int] = []
        self.reported: list[Any] = []
        module = "s4g_ray.pipeline.rounds"
        monkeypatch.setattr(f"{module}.mining_round.embed", self._embed)
        monkeypatch.setattr(f"{module}.miner.mine", self._mine)
        monkeypatch.setattr(f"{module}.miner.sample_queries", lambda *_: (None, None))
        monkeypatch.setattr(
            f"{module}.miner._find_embedded", lambda *args: np.ones(len(args[2]), bool)
        )
        monkeypatch.setattr(f"{module}.mining_round.MiningRound._stamp", lambda *_: STAMP)
        monkeypatch.setattr(Miner, "service_for", lambda _, *args: self._service_for(*args))
        monkeypatch.setattr(f"{module}.miner.Miner._log_summary", lambda *_: None)
        monkeypatch.setattr(RunGraphs, "round_record", lambda *_: {"collection": "pairs"})

    def _service_for(self, collection: str, num_vectors: int, dim: int) -> Any:
        self.planned.append(num_vectors)
        index = SimpleNamespace(
            summary=lambda: {"engine": "faiss"}, describe=lambda: "flat", reason="it fits"
        )

        def build(epoch: int, embeddings: str, ids: Ints, **_: Any) -> Any:
            self.built.append(ids)
            return index

        def report(epoch: int, *, stamp: Any, ids: Ints) -> Any:
            self.reported.append(ids)

        return SimpleNamespace(
            report=report,
            build=build,
            client=None,
            effort_taken=lambda _: SimpleNamespace(describe=lambda: ""),
        )

    def _embed(self, *args: Any, **options: Any) -> Any:
        self.embedded.append(options)
        report = {"images": 1, "seconds": 1.0, "warm_images_per_s": 1.0, "reused_parts": 0}
        return SimpleNamespace(bad_images=(), **report)

    def _mine(self, *args: Any, **options: Any) -> Any:
        self.mined.append(options)

    def publish_graphs(self, *versions: int) -> None:
        for version in versions:
            for collection in self.graphs.collections:
                publish(self.graphs.uri(version, collection), "neighbors", [], STAMP)

    def round(self, epoch: int) -> None:
        cfg = self.config
        miner = Miner(self.graphs, cfg.mining, Reporter(), seed=cfg.seed, ray=cfg.ray)
        pool: Any = SimpleNamespace(start_first=lambda: None)
        nothing: Any = None
        MiningRound(
            self.config,
            nothing,
            self.graphs,
            Schedule(self.config),
            miner,
            pool,
            nothing,
            nothing,
            Reporter(),
            spans={},
        ).mine(epoch)


@pytest.fixture
def case(regional: GeoDataset, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Case:
    return Case(regional, tmp_path / "run", monkeypatch)


def test_the_first_round_takes_all_places_and_so_does_one_without_a_mined_graph(
    case: Case,
) -> None:
    case.publish_graphs(0)
    for epoch in (2, 4):
        assert case.graphs.share_of_round(epoch) is None
        case.round(epoch)
    assert [options.get("only_places") for options in case.embedded] == [None, None]
    assert all(options["carry_from"] is None for options in case.mined)
    assert np.array_equal(case.mined[0]["query_ids"], case.split.query_ids)


def test_later_rounds_embed_and_search_their_share_and_carry_on_the_rest(case: Case) -> None:
    case.publish_graphs(0, 2)
    share = case.graphs.share_of_round(4)
    assert share is not None
    case.round(4)
    (embedded,) = case.embedded
    assert np.array_equal(embedded["only_places"], share)
    pairs, gallery = case.mined
    for mined, collection in zip((pairs, gallery), case.graphs.collections, strict=True):
        assert mined["carry_from"] == mined["previous"] == case.graphs.uri(2, collection)
        assert np.isin(mined["reference_places"], share).all()
    own = np.isin(case.split.pairs.place_ids, share)
    assert np.array_equal(pairs["query_ids"], case.split.pairs.query_ids[own])
    assert np.array_equal(gallery["query_ids"], pairs["query_ids"])
    assert np.array_equal(case.built[0], pairs["reference_ids"])
    assert np.array_equal(case.reported[0], pairs["reference_ids"])
    assert case.split.gallery is not None
    # beside the index of a share, shards may hold one of all references
    assert case.planned == [len(case.split.reference_ids), len(case.split.gallery.ids)]
    # the two rounds of a cycle take all references of both collections
    case.publish_graphs(4)
    case.round(6)
    references = [
        np.concatenate([case.mined[i]["reference_ids"] for i in both]) for both in ((0, 2), (1, 3))
    ]
    assert np.array_equal(np.sort(references[0]), case.split.reference_ids)
    assert np.array_equal(np.sort(references[1]), np.sort(case.split.gallery.ids))


def test_a_round_with_an_evaluation_embeds_the_whole_gallery(case: Case) -> None:
    case.config = case.config.model_copy(
        update={"evaluation": case.config.evaluation.model_copy(update={"every_epochs": 4})}
    )
    case.publish_graphs(0, 2)
    case.round(4)
    share = case.graphs.share_of_round(4)
    assert share is not None
    assert case.split.gallery is not None
    wanted = np.union1d(share, case.split.gallery.places.ids)
    assert np.array_equal(case.embedded[0]["only_places"], wanted)
    assert np.isin(case.mined[0]["reference_places"], share).all()


def test_a_share_with_no_more_places_than_neighbors_is_refused_before_the_run(
    synthetic: GeoDataset,
) -> None:
    dataset = open_dataset(synthetic.uri)
    config = tiny_config("x", dataset.uri, mining={"refresh": "rotate", "refresh_share": 0.1})
    with pytest.raises(InputError, match=r"refresh_share=0\.1 takes 8 of 96 places in a round"):
        check_against_dataset(config, dataset, TrainSplit.read(config, dataset))


ray_task_error: Any = RayTaskError  # has no annotations


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (GetTimeoutError("no answer"), RunError),
        (ray_task_error("search", "ValueError: odd", ValueError("odd")), RunError),
        (pa.ArrowInvalid("not Parquet"), RunError),
        (GpuMemoryError("full"), GpuMemoryError),
        (BadImageError("a.jpg"), BadImageError),
        (ValueError("a fault of ours"), ValueError),
    ],
)
def test_errors_of_ray_and_arrow_are_tried_again_and_others_are_not(
    error: Exception, wanted: type[Exception]
) -> None:
    raised = run_error_of(error) or error
    assert isinstance(raised, wanted)
    assert isinstance(raised, RunError) == issubclass(wanted, RunError)


def test_the_no_progress_guard_of_ray_data_is_tried_again() -> None:
    guard = type("ExecutionTimeoutError", (Exception,), {"__module__": "ray.data.exceptions"})
    raised = run_error_of(guard("no progress"))
    assert isinstance(raised, RunError)
    assert "ExecutionTimeoutError: no progress" in str(raised)


def test_every_share_holds_train_places_however_many_more_the_gallery_has(case: Case) -> None:
    gallery = case.split.gallery
    assert gallery is not None
    many = np.arange(10_000, 40_000)
    rng = np.random.default_rng(0)
    places = Places(many, rng.uniform(30, 40, len(many)), rng.uniform(0, 10, len(many)))
    far = replace(gallery, ids=many, place_ids=many, places=places)
    graphs = replace(case.graphs, split=replace(case.split, gallery=far))
    case.publish_graphs(0, 2)
    for epoch in (4, 6, 8):
        share = graphs.share_of_round(epoch)
        assert share is not None
        num_train = int(np.isin(case.split.places.ids, share).sum())
        assert num_train >= smallest_share(case.config.mining, len(case.split.places)) > 0
