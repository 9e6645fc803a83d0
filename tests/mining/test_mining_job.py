from __future__ import annotations

import json
import os
import signal
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from ray.exceptions import RaySystemError

from s4g_ray.arrays import Ints
from s4g_ray.config.schema import MiningConfig
from s4g_ray.data.exclusions import Exclusions, PlacePairs
from s4g_ray.data.places import Places
from s4g_ray.data.tables.neighbor_graph import NeighborGraph, read_graph
from s4g_ray.data.tables.query_scores import read_query_scores
from s4g_ray.errors import InputError, RunError
from s4g_ray.mining.mining_job import mine
from s4g_ray.storage.files import MANIFEST, list_names
from s4g_ray.storage.manifest import open_published, publish
from tests.support.mining_tables import STAMP, write_queries, write_view

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]

Vectors = NDArray[np.float32]
NUM_QUERIES = 60
NUM_PLACES = 34
PART_ROWS = 4
K = 5


@dataclass(frozen=True)
class ExactSearch:
    """Searches all references in memory.

    Each call leaves a file in the folder `notes` whose name begins with its number of queries (a
    name is there whole, content may not be where a task is killed). Fails from the call
    `fails_from` on.
    """

    ids: Ints
    vectors: Vectors
    notes: str
    fails_from: int = 10**9

    def search(self, version: int, queries: Vectors, k: int) -> tuple[Ints, Vectors]:
        assert version == 7
        assert queries.dtype == np.float32
        notes = Path(self.notes)
        if len(list(notes.iterdir())) >= self.fails_from:
            raise RunError("shard 1 of version 7 does not answer; start it again")
        (notes / f"{len(queries)}-{uuid.uuid4().hex}").touch()
        scores = queries @ self.vectors.T
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return self.ids[order], np.take_along_axis(scores, order, 1)

    def num_asked(self) -> int:
        return sum(int(note.name.split("-")[0]) for note in Path(self.notes).iterdir())


@dataclass
class Case:
    """Queries in the order of places, one to five a place, and one or more references a place."""

    folder: Path
    query_ids: Ints
    query_places: Ints
    queries: Vectors
    reference_ids: Ints
    reference_places: Ints
    references: Vectors
    exclusions: Exclusions
    num_searches: int = 0

    def search(self, fails_from: int = 10**9) -> ExactSearch:
        self.num_searches += 1
        notes = self.folder / f"notes-{self.num_searches}"
        notes.mkdir()
        return ExactSearch(self.reference_ids, self.references, str(notes), fails_from)

    def mine(self, target: str, search: ExactSearch, cfg: dict[str, Any], **changed: Any) -> Any:
        arguments: dict[str, Any] = {
            "query_ids": self.query_ids,
            "reference_ids": self.reference_ids,
            "k": K,
            "stamp": STAMP,
            "reference_places": self.reference_places,
            "exclusions": self.exclusions,
            **changed,
        }
        config = MiningConfig(part_mb=6 * K * 4e-6, query_block=5, **cfg)
        return mine(
            search, 7, str(self.folder / "e"), str(self.folder / target), cfg=config, **arguments
        )


@pytest.fixture
def case(tmp_path: Path) -> Case:
    rng = np.random.default_rng(5)

    def draw_unit_vectors(count: int) -> Vectors:
        vectors = rng.standard_normal((count, 6)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    ids = np.sort(rng.choice(500, NUM_QUERIES, replace=False))
    places = np.sort(
        np.concatenate([np.arange(NUM_PLACES), rng.integers(0, 8, NUM_QUERIES - NUM_PLACES)])
    )
    reference_places = rng.permutation(
        np.concatenate([np.arange(NUM_PLACES), rng.integers(0, NUM_PLACES, 9)])
    )
    reference_ids = np.sort(rng.choice(900, len(reference_places), replace=False))
    queries = draw_unit_vectors(NUM_QUERIES)
    references = draw_unit_vectors(len(reference_places))
    # every other query is near its own reference
    queries[::2] += 2 * references[[np.argmax(reference_places == place) for place in places[::2]]]
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    # 111 m apart
    lat = np.arange(NUM_PLACES, dtype=np.float64) * 1e-3
    row = Places(np.arange(NUM_PLACES), lat, np.zeros(NUM_PLACES))
    pairs = PlacePairs.from_arrays(rng.integers(0, NUM_PLACES, 20), rng.integers(0, NUM_PLACES, 20))
    write_queries(str(tmp_path / "e"), ids, places, queries, PART_ROWS)
    exclusions = Exclusions(row, pairs, 120.0)
    return Case(
        tmp_path, ids, places, queries, reference_ids, reference_places, references, exclusions
    )


def loop_over_full_similarity(
    case: Case, cfg: dict[str, Any]
) -> tuple[dict[int, list[int]], dict[str, float]]:
    """Compute the neighbors of each place, and the report's figures, from all scores."""
    best: dict[int, dict[int, float]] = {}
    ranks = []
    num_above = 0
    num_kept = 0
    for vector, own in zip(case.queries, case.query_places.tolist(), strict=True):
        scores = case.references @ vector
        by_place = {p: float(scores[case.reference_places == p].max()) for p in range(NUM_PLACES)}
        positive = by_place[own]
        ranks.append(int((scores > positive).sum()) + 1)
        semi = case.exclusions.semi_positives
        excluded = {own, *semi.second[semi.first == own].tolist(), own - 1, own + 1}
        others = sorted(
            (-score, place) for place, score in by_place.items() if place not in excluded
        )
        others = others[cfg.get("range_min", 0) :]
        limit = cfg.get("max_score", 2)
        if "relative_margin" in cfg:
            limit = positive - abs(positive) * cfg["relative_margin"]
        kept = [(place, -score) for score, place in others if -score <= limit][:K]
        num_above += sum(score > positive for _, score in kept)
        num_kept += len(kept)
        row = best.setdefault(own, {})
        if cfg.get("merge_queries") is False:
            row.clear()  # the next query of a place overwrites
        for place, score in kept:
            row[place] = max(row.get(place, -2.0), score)
    graph = {own: sorted(row, key=lambda place: -row[place])[:K] for own, row in best.items()}
    figures = {f"train_recall@{n}": float(np.mean(np.array(ranks) <= n)) for n in (1, 5, 10)}
    return graph, {**figures, "above_positive": num_above / max(num_kept, 1)}


def neighbors_by_place(graph: NeighborGraph) -> dict[int, list[int]]:
    rows = zip(graph.place_ids.tolist(), graph.neighbors.tolist(), strict=True)
    return {place: [n for n in row if n >= 0] for place, row in rows}


@pytest.mark.parametrize(
    "cfg",
    [
        {},
        {"range_min": 2, "max_score": 0.6},
        {"relative_margin": 0.1, "merge_queries": False},
    ],
)
def test_the_graph_and_its_figures_equal_those_of_the_full_similarity(
    case: Case, cfg: dict[str, Any]
) -> None:
    seen: list[tuple[int, int]] = []
    report = case.mine(
        "g",
        case.search(),
        cfg,
        info={"age": 3},
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert "xyz" in vars(case.exclusions.places)  # computed once, here, and not by each task
    wanted, figures = loop_over_full_similarity(case, cfg)
    uri = str(case.folder / "g")
    parts = list(read_graph(uri, stamp=STAMP))
    assert len(parts) > 2
    # load refuses places that are in two parts
    assert neighbors_by_place(NeighborGraph.load(uri)) == wanted
    assert list_names(uri) == sorted(
        [MANIFEST, *(part.name for part in open_published(uri, "neighbors").parts)]
    )
    assert open_published(uri, "neighbors").info == {
        "source": "similarity",
        "k": K,
        "round": {"age": 3, **report.metrics()},
    }
    assert {name: report.metrics()[name] for name in figures} == pytest.approx(figures)
    assert (report.queries, report.places, report.overlap) == (NUM_QUERIES, NUM_PLACES, None)
    assert report.neighbors == sum(len(row) for row in wanted.values())
    assert report.coverage == report.neighbors / (NUM_PLACES * K)
    assert report.short == sum(len(row) < K for row in wanted.values())
    filters = cfg.keys() - {"merge_queries"}
    assert all(report.dropped[name] > 0 for name in ("own", "semi_positive", "near", *filters))
    assert sorted(seen) == seen
    assert seen[-1] == (NUM_QUERIES, NUM_QUERIES)


def test_scores_of_queries_against_their_own_place_are_published_with_the_graph(case: Case) -> None:
    """Then rows and scores of the places that a round does not take are carried on."""
    order = np.argsort(case.reference_places, kind="stable")
    table = str(case.folder / "e")
    parts = [
        *open_published(table, "embeddings").parts,
        *write_view(
            table,
            "references",
            case.reference_ids[order],
            case.reference_places[order],
            case.references[order],
            PART_ROWS,
        ),
    ]
    publish(table, "embeddings", parts, STAMP)
    wanted = {}
    for query, place, vector in zip(
        case.query_ids.tolist(), case.query_places, case.queries, strict=True
    ):
        if (case.query_places == place).sum() > 1:
            own = case.references[case.reference_places == place]
            wanted[query] = float((own @ vector).max())
    case.mine("g", case.search(), {}, scores_positives=True)
    share = case.query_ids[case.query_places < 4]
    case.mine(
        "h",
        case.search(),
        {},
        query_ids=share,
        carry_from=str(case.folder / "g"),
        scores_positives=True,
    )
    assert 0 < np.isin(list(wanted), share).sum() < len(wanted)
    for name in ("g", "h"):
        found = read_query_scores(str(case.folder / name))
        assert found.query_ids.tolist() == sorted(wanted)
        scores = [wanted[query] for query in sorted(wanted)]
        np.testing.assert_allclose(found.scores, scores, atol=1e-6)
    graph = NeighborGraph.load(str(case.folder / "g"))
    assert neighbors_by_place(graph) == loop_over_full_similarity(case, {})[0]


def test_embeddings_of_half_precision_are_searched_in_float32(case: Case) -> None:
    half = case.queries.astype(np.float16)
    case.queries = half.astype(np.float32)
    write_queries(str(case.folder / "e"), case.query_ids, case.query_places, half, PART_ROWS)
    with pytest.raises(RunError, match=r"made with dtype 'float16', but 'float32' is wanted"):
        case.mine("g", case.search(), {})
    case.mine("g", case.search(), {}, stamp=replace(STAMP, dtype="float16"))
    table = str(case.folder / "e")
    found = open_published(table, "embeddings")
    # parts whose vectors do not match the stamp
    publish(table, "embeddings", found.parts, STAMP, found.info)
    with pytest.raises(
        RunError, match=r"part-00000\.parquet holds float16 vectors of D=6, but float32 of D=6"
    ):
        case.mine("h", case.search(), {})
    assert (
        neighbors_by_place(NeighborGraph.load(str(case.folder / "g")))
        == loop_over_full_similarity(case, {})[0]
    )


def test_the_overlap_with_the_previous_graph_is_counted_place_by_place(case: Case) -> None:
    case.mine("old", case.search(), {"range_min": 2})
    report = case.mine("new", case.search(), {}, previous=str(case.folder / "old"))
    old, new = (
        neighbors_by_place(NeighborGraph.load(str(case.folder / name))) for name in ("old", "new")
    )
    shared = sum(len(set(row) & set(old[place])) for place, row in new.items())
    assert 0 < shared < report.neighbors
    assert report.overlap == shared / report.neighbors
    assert case.mine("again", case.search(), {}, previous=str(case.folder / "new")).overlap == 1


def test_queries_that_are_not_mined_are_left_out(case: Case) -> None:
    rows = np.unique(case.query_places, return_index=True)[1]  # each place once
    case.mine("g", case.search(), {}, query_ids=case.query_ids[rows], exclusions=None)
    graph = NeighborGraph.load(str(case.folder / "g"))
    assert graph.place_ids.tolist() == list(range(NUM_PLACES))
    scores = case.queries[rows] @ case.references.T
    for place, row in zip(graph.place_ids.tolist(), graph.neighbors.tolist(), strict=True):
        ranked = [
            p for p in case.reference_places[np.argsort(-scores[place])].tolist() if p != place
        ]
        assert row == list(dict.fromkeys(ranked))[:K]


def test_rows_of_an_earlier_graph_are_carried_over_for_places_that_are_not_mined(
    case: Case,
) -> None:
    case.mine("old", case.search(), {"range_min": 2})
    old = NeighborGraph.load(str(case.folder / "old"))
    is_mined = case.query_places % 3 == 0
    report = case.mine(
        "g",
        case.search(),
        {},
        query_ids=case.query_ids[is_mined],
        previous=str(case.folder / "old"),
        carry_from=str(case.folder / "old"),
    )
    uri = str(case.folder / "g")
    graph = NeighborGraph.load(uri, stamp=STAMP)
    wanted = neighbors_by_place(old) | {
        place: row
        for place, row in loop_over_full_similarity(case, {})[0].items()
        if place % 3 == 0
    }
    assert neighbors_by_place(graph) == wanted
    carried = graph.place_ids % 3 > 0
    assert graph.scores is not None
    assert old.scores is not None
    assert graph.scores[carried].tolist() == old.scores[graph.place_ids[carried]].tolist()
    assert (report.places, report.carried) == (sum(~carried), sum(carried))
    assert report.overlap is not None
    assert report.overlap < 1  # of the mined places alone
    with pytest.raises(InputError, match=r"are both .*; choose another target"):
        case.mine("g", case.search(), {}, carry_from=uri)


def test_queries_whose_images_were_left_out_are_counted(case: Case) -> None:
    folder = str(case.folder / "e")
    write_queries(folder, case.query_ids, case.query_places, case.queries, PART_ROWS, bad_images=3)
    report = case.mine(
        "g", case.search(), {}, query_ids=np.concatenate([case.query_ids, [1000, 1001]])
    )
    assert (report.queries, report.without_embedding) == (NUM_QUERIES, 2)


def interrupt(case: Case, target: str) -> tuple[Path, int]:
    """Run a job that fails on the way; return its folder of commits and their number of queries."""
    with pytest.raises(RunError, match=r"^shard 1 of version 7 does not answer; start it again$"):
        case.mine(target, case.search(fails_from=12), {"num_searchers": 1})
    work = case.folder / target / "_work"
    commits = [json.loads(path.read_text()) for path in work.glob("group-*.json")]
    assert not (case.folder / target / MANIFEST).exists()
    assert commits
    return work, sum(commit["outcome"]["counts"]["queries"] for commit in commits)


def test_a_resumed_job_asks_only_uncommitted_queries_and_ends_as_an_uninterrupted_one(
    case: Case,
) -> None:
    wanted = case.mine("whole", case.search(), {})
    work, committed = interrupt(case, "g")
    num_commits = len(list(work.glob("*.json")))
    search = case.search()
    report = case.mine("g", search, {})
    assert 0 < committed < NUM_QUERIES
    assert search.num_asked() == NUM_QUERIES - committed
    assert report.reused_parts == num_commits
    whole, resumed = (NeighborGraph.load(str(case.folder / name)) for name in ("whole", "g"))
    assert resumed.place_ids.tolist() == whole.place_ids.tolist()
    assert resumed.neighbors.tolist() == whole.neighbors.tolist()
    same = {"seconds": 0.0, "reused_parts": 0}
    assert {**report.metrics(), **same} == {**wanted.metrics(), **same}


def test_commits_of_another_job_and_damaged_parts_are_not_kept(case: Case) -> None:
    work, committed = interrupt(case, "g")
    search = case.search()
    report = case.mine("g", search, {"max_score": 0.9})  # another graph
    assert report.reused_parts == 0
    assert search.num_asked() >= NUM_QUERIES
    interrupt(case, "i")
    built_anew = {"index": "ivf_rabitq", "bits": 1, "effort": 96}
    assert case.mine("i", case.search(), {}, info=built_anew).reused_parts == 0
    work, committed = interrupt(case, "h")
    damaged = sorted((case.folder / "h").glob("part-*.parquet"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    commit = json.loads(sorted(work.glob("group-*.json"))[0].read_text())
    num_lost = commit["outcome"]["counts"]["queries"]
    search = case.search()
    case.mine("h", search, {})
    assert search.num_asked() == NUM_QUERIES - committed + num_lost


@dataclass(frozen=True)
class DeadlySearch:
    """Kills the process of the first task that has had two answers."""

    search_exactly: ExactSearch
    marker: str

    def search(self, version: int, queries: Vectors, k: int) -> tuple[Ints, Vectors]:
        found = self.search_exactly.search(version, queries, k)
        if self.search_exactly.num_asked() > 10 and not Path(self.marker).exists():
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return found


def test_a_searching_task_that_is_killed_is_repeated_with_the_same_graph(case: Case) -> None:
    marker = case.folder / "killed"
    wanted = case.mine("whole", case.search(), {})
    deadly: Any = DeadlySearch(case.search(), str(marker))
    report = case.mine("g", deadly, {})
    assert marker.exists()
    whole, repeated = (case.folder / name for name in ("whole", "g"))
    parts = open_published(str(whole), "neighbors").parts
    assert open_published(str(repeated), "neighbors").parts == parts
    assert {**report.metrics(), "seconds": 0.0} == {**wanted.metrics(), "seconds": 0.0}


@dataclass(frozen=True)
class SlowSearch:
    """Waits before each answer but the first until a file lies there."""

    search_exactly: ExactSearch
    until: str

    def search(self, version: int, queries: Vectors, k: int) -> tuple[Ints, Vectors]:
        while self.search_exactly.num_asked() and not Path(self.until).exists():
            time.sleep(0.01)
        return self.search_exactly.search(version, queries, k)


def test_progress_counts_blocks_of_queries_before_any_task_has_ended(case: Case) -> None:
    until = case.folder / "until"
    seen: list[int] = []

    def note(done: int, _: int) -> None:
        seen.append(done)
        if done:
            until.touch()

    slow: Any = SlowSearch(case.search(), str(until))
    case.mine("g", slow, {"num_searchers": 1}, on_progress=note)
    assert next(done for done in seen if done) == 5  # one block of the first task
    assert seen == sorted(seen)


def test_an_error_of_ray_is_a_run_error_that_gives_its_reason(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> Any:
        error: Any = RaySystemError
        raise error("the object store is full")

    monkeypatch.setattr("s4g_ray.mining.task_runner.ray.wait", fail)
    with pytest.raises(RunError, match=r"after 0 of 60 queries: .*the object store is full"):
        case.mine("g", case.search(), {})


class BrokenIndex:
    def search(self, version: int, queries: Vectors, k: int) -> Any:
        raise ValueError("queries have 6 dimensions, the index 8")


def test_the_error_of_a_task_is_reported_with_its_own_message(case: Case) -> None:
    broken: Any = BrokenIndex()
    with pytest.raises(
        RunError,
        match=r"after 0 of 60 queries: ValueError: queries have 6 dimensions, the index 8$",
    ):
        case.mine("g", broken, {})


def test_an_altered_embedding_part_is_named(case: Case) -> None:
    part = case.folder / "e" / "queries" / "part-00003.parquet"
    other = str(case.folder / "other")
    ids = case.query_ids[12:16]
    write_queries(other, ids, case.query_places[12:16], -case.queries[:4], 4)
    part.write_bytes((case.folder / "other" / "queries" / "part-00000.parquet").read_bytes())
    with pytest.raises(RunError, match=r"part-00003\.parquet differs from the published file"):
        case.mine("g", case.search(), {})
