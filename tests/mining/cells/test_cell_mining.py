from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.config.schema import MiningConfig
from s4g_ray.data.exclusions import Exclusions, PlacePairs
from s4g_ray.data.places import Places
from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.errors import RunError
from s4g_ray.mining.candidates import References, SearchReferences
from s4g_ray.mining.cells import cell_tasks
from s4g_ray.mining.cells.cell_plan import CellPlan
from s4g_ray.mining.cells.cell_tasks import CellSearch
from s4g_ray.mining.mining_job import mine
from s4g_ray.storage.files import MANIFEST, list_names
from s4g_ray.storage.manifest import open_published, publish
from tests.mining.cells.test_geographic_cells import draw_places
from tests.support.mining_tables import STAMP, write_view

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]
K = 5
NUM_PLACES = 120
DIM = 6


@dataclass(frozen=True)
class SortedScores:
    """Exact search by sorting all scores; fails when `fails_in` is a candidate."""

    fails_in: int = -1

    def open(self, vectors: Floats32, ids: Ints) -> SearchReferences:
        if self.fails_in in ids:
            raise RunError("a disk is full")

        def answer(queries: Floats32, k: int) -> tuple[Ints, Floats32]:
            scores = queries @ vectors.T
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            return ids[order], np.take_along_axis(scores, order, 1)

        return answer


@dataclass
class Case:
    """A table with one or two queries and references a place, in parts of 16 rows."""

    folder: Path
    places: Places
    query_ids: Ints
    query_places: Ints
    queries: Floats32
    references: References
    vectors: Floats32
    exclusions: Exclusions
    cfg: MiningConfig

    def mine(self, target: str, fails_in: int = -1, **changed: Any) -> Any:
        settings = {"seed": (1, 2), **changed}
        search = CellSearch(SortedScores(fails_in), self.places, settings["seed"])
        return mine(
            search,
            7,
            str(self.folder / "e"),
            str(self.folder / target),
            cfg=self.cfg,
            k=K,
            query_ids=self.query_ids,
            reference_ids=self.references.ids,
            reference_places=self.references.places,
            exclusions=self.exclusions,
            stamp=STAMP,
        )

    def candidates(self) -> dict[int, set[int]]:
        """Return the references that the queries of each place search, from the plan."""
        plan = CellPlan.from_places(
            self.places, np.unique(self.query_places), self.references, self.cfg, K, (1, 2)
        )
        found = {}
        for place in np.unique(self.query_places):
            cell = plan.cells_of(np.array([place]))
            around = plan.cells.around(cell)
            block = plan.blocks_of_queries(np.array([place]))[0]
            near = np.flatnonzero(np.isin(plan.cells_of(self.references.places), around))
            found[int(place)] = {*near.tolist(), *plan.far_rows_of(int(block)).tolist()}
        return found


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    rng = np.random.default_rng(5)
    places = draw_places(NUM_PLACES, 6)

    def draw_view(extra: int) -> tuple[Ints, Ints, Floats32]:
        of_place = np.sort(np.concatenate([places.ids, rng.choice(places.ids, extra)]))
        ids = np.sort(rng.choice(900, len(of_place), replace=False))
        ids = ids[rng.permutation(len(ids))]  # the table is in the order of places, not of ids
        vectors = rng.standard_normal((len(ids), DIM)).astype(np.float32)
        return ids, of_place, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    folder = str(tmp_path / "e")
    queries = draw_view(30)
    references = draw_view(40)
    parts = write_view(folder, "queries", *queries, 16)
    parts += write_view(folder, "references", *references, 16)
    publish(folder, "embeddings", parts, STAMP, {})
    order = np.argsort(queries[0])
    ranked = np.argsort(references[0])
    pairs = PlacePairs.from_arrays(rng.choice(places.ids, 60), rng.choice(places.ids, 60))
    return Case(
        tmp_path,
        places,
        queries[0][order],
        queries[1][order],
        queries[2][order],
        References(references[0][ranked], references[1][ranked]),
        references[2][ranked],
        Exclusions(places, pairs, 1000.0),
        MiningConfig(
            scope="cells",
            cell_places=8,
            far_references=15,
            part_mb=20 * K * 4e-6,
            query_block=3,
        ),
    )


def loop_over_candidates(case: Case, candidates: dict[int, set[int]]) -> dict[int, list[int]]:
    """Compute the neighbors of each place from all scores of its candidates."""
    graph: dict[int, dict[int, float]] = {}
    for vector, own in zip(case.queries, case.query_places.tolist(), strict=True):
        rows = np.array(sorted(candidates[own]))
        best: dict[int, float] = {}
        for row, score in zip(rows.tolist(), (case.vectors[rows] @ vector).tolist(), strict=True):
            place = int(case.references.places[row])
            best[place] = max(best.get(place, -2.0), score)
        others = np.array(list(best))
        excluded = case.exclusions.contains(np.full(len(others), own), others)
        kept = sorted(
            (-best[place], place) for place in others[~excluded & (others != own)].tolist()
        )[:K]
        row = graph.setdefault(own, {})
        if case.cfg.merge_queries is False:
            row.clear()  # the next query of a place overwrites
        for score, place in kept:
            row[place] = max(row.get(place, -2.0), -score)
    return {own: sorted(row, key=lambda place: -row[place])[:K] for own, row in graph.items()}


def neighbors_by_place(uri: Path) -> dict[int, list[int]]:
    graph = NeighborGraph.load(str(uri), stamp=STAMP)
    rows = zip(graph.place_ids.tolist(), graph.neighbors.tolist(), strict=True)
    return {place: [n for n in row if n >= 0] for place, row in rows}


def test_the_graph_is_that_of_all_scores_of_each_cell_s_candidates(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cell_tasks, "DEALT_BYTES", 2000)  # many files
    report = case.mine("g")
    candidates = case.candidates()
    assert 30 < np.mean([len(rows) for rows in candidates.values()]) < len(case.references) / 1.5
    wanted = loop_over_candidates(case, candidates)
    assert neighbors_by_place(case.folder / "g") == wanted
    parts = open_published(str(case.folder / "g"), "neighbors").parts
    assert len(parts) > 2
    assert list_names(str(case.folder / "g")) == sorted([MANIFEST, *(part.name for part in parts)])
    assert report.queries == len(case.query_ids)
    assert report.places == NUM_PLACES
    again = case.mine("again")
    assert open_published(str(case.folder / "again"), "neighbors").parts == parts
    assert again.neighbors == report.neighbors
    case.mine("other", seed=(1, 3))  # other far references
    assert open_published(str(case.folder / "other"), "neighbors").parts != parts


@pytest.mark.parametrize("merges", [None, False])
def test_one_cell_gives_the_graph_of_all_references(case: Case, merges: bool | None) -> None:
    changes = {"cell_places": NUM_PLACES, "merge_queries": merges}
    case.cfg = case.cfg.model_copy(update=changes)
    case.mine("g")
    everything = {place: set(range(len(case.references))) for place in case.query_places.tolist()}
    assert neighbors_by_place(case.folder / "g") == loop_over_candidates(case, everything)


def test_a_resumed_job_keeps_dealt_rows_and_finished_blocks(case: Case) -> None:
    case.cfg = case.cfg.model_copy(update={"num_searchers": 1, "far_references": 0})
    case.mine("whole")
    plan = CellPlan.from_places(case.places, case.places.ids, case.references, case.cfg, K, (1, 2))
    last = plan.cells_of(case.references.places) == len(plan.cells) - 1
    missing = int(case.references.ids[last][0])  # a candidate of the last block, not of the first
    with pytest.raises(RunError, match=r"^a disk is full$"):
        case.mine("g", fails_in=missing)
    num_kept = len(list((case.folder / "g" / "_work").glob("*.json")))
    report = case.mine("g")
    assert report.reused_parts == num_kept > 2
    whole, resumed = (
        open_published(str(case.folder / name), "neighbors").parts for name in ("whole", "g")
    )
    assert whole == resumed


def test_a_table_in_float16_is_searched_in_float32(case: Case) -> None:
    folder = str(case.folder / "e")
    half = case.queries.astype(np.float16)
    case.queries = half.astype(np.float32)
    order = np.argsort(case.query_places, kind="stable")
    parts = write_view(
        folder, "queries", case.query_ids[order], case.query_places[order], half[order], 16
    )
    half = case.vectors.astype(np.float16)
    case.vectors = half.astype(np.float32)
    order = np.argsort(case.references.places, kind="stable")
    columns = (case.references.ids[order], case.references.places[order], half[order])
    parts += write_view(folder, "references", *columns, 16)
    publish(folder, "embeddings", parts, replace(STAMP, dtype="float16"), {})
    search = CellSearch(SortedScores(), case.places, (1, 2))
    mine(
        search,
        7,
        folder,
        str(case.folder / "g"),
        cfg=case.cfg,
        k=K,
        query_ids=case.query_ids,
        reference_ids=case.references.ids,
        reference_places=case.references.places,
        exclusions=case.exclusions,
        stamp=replace(STAMP, dtype="float16"),
    )
    graph = NeighborGraph.load(str(case.folder / "g"))
    wanted = loop_over_candidates(case, case.candidates())
    rows = zip(graph.place_ids.tolist(), graph.neighbors.tolist(), strict=True)
    assert {place: [n for n in row if n >= 0] for place, row in rows} == wanted
