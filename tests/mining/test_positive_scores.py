"""Scores of queries against their own places, from tables of several parts, without a cluster."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.data.tables.neighbor_graph import publish_graph
from s4g_ray.data.tables.query_scores import describe_query_scores, read_query_scores
from s4g_ray.errors import RunError
from s4g_ray.mining.job_plan import describe_group
from s4g_ray.mining.positive_scores import (
    Scoring,
    carry_scores,
    score_group,
    written_parts,
)
from s4g_ray.storage.manifest import Part, open_published, publish
from tests.support.mining_tables import STAMP, write_view

DIM = STAMP.dim


class Tables:
    """Queries and references of 20 places in the order of places, in parts of 4 rows or more."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(2)
        self.folder = str(folder / "e")
        self.places = np.sort(rng.integers(0, 20, 45))
        self.ids = rng.permutation(45) + 100
        self.vectors = rng.standard_normal((45, DIM)).astype(np.float32)
        self.reference_places = np.sort(np.concatenate([np.arange(3, 23), rng.integers(3, 23, 9)]))
        self.reference_ids = rng.permutation(29) + 700
        self.references = rng.standard_normal((29, DIM)).astype(np.float32)
        parts = [
            *write_view(self.folder, "queries", self.ids, self.places, self.vectors, 4),
            *write_view(
                self.folder,
                "references",
                self.reference_ids,
                self.reference_places,
                self.references,
                5,
            ),
        ]
        publish(self.folder, "embeddings", parts, STAMP)

    def oracle(self, query_ids: Ints, reference_ids: Ints) -> dict[int, float]:
        """Compute the score of each of some queries by loops over all pairs."""
        found = {}
        for query, place, vector in zip(self.ids, self.places, self.vectors, strict=True):
            mates = [i for i, other in zip(self.ids, self.places, strict=True) if other == place]
            if query not in query_ids or sum(i in query_ids for i in mates) < 2:
                continue
            scores = [
                cosine(vector, self.references[row])
                for row, own in enumerate(self.reference_places)
                if own == place and self.reference_ids[row] in reference_ids
            ]
            if scores:
                found[int(query)] = max(scores)
        return found

    def score(self, target: str, query_ids: Ints, reference_ids: Ints) -> list[Part]:
        shared = Scoring.from_embeddings(self.folder, target, query_ids, reference_ids)
        parts = [p for p in open_published(self.folder, "embeddings").parts if "queries" in p.name]
        assert len(parts) > 5
        rows = [
            describe_group(number, parts, list(range(first, min(first + 2, len(parts)))))
            for number, first in enumerate(range(0, len(parts), 2))
        ]
        return written_parts([score_group(shared, row, lambda _: None) for row in rows])


def cosine(a: Floats32, b: Floats32) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def assert_published(uri: str, parts: list[Part], wanted: dict[int, float]) -> None:
    publish_graph(uri, [], 3, info=describe_query_scores(parts))
    found = read_query_scores(uri)
    assert found.query_ids.tolist() == sorted(wanted)
    np.testing.assert_allclose(found.scores, [wanted[i] for i in sorted(wanted)], atol=1e-6)


def test_queries_of_places_with_several_are_scored_against_their_best_reference(
    tmp_path: Path,
) -> None:
    made = Tables(tmp_path)
    target = str(tmp_path / "graph")
    chosen = np.sort(made.ids)[:-6]
    references = np.sort(made.reference_ids)[2:]
    wanted = made.oracle(chosen, references)
    assert 20 < len(wanted) < len(chosen)
    assert_published(target, made.score(target, chosen, references), wanted)


def test_scores_of_queries_that_a_round_does_not_take_are_carried_on(tmp_path: Path) -> None:
    made = Tables(tmp_path)
    before = str(tmp_path / "before")
    after = str(tmp_path / "after")
    everything = np.sort(made.reference_ids)
    all_queries = np.sort(made.ids)
    wanted = made.oracle(all_queries, everything)
    assert_published(before, made.score(before, all_queries, everything), wanted)
    share = np.sort(made.ids[made.places < 9])
    fewer = everything[4:]
    parts = made.score(after, share, fewer)
    carried = carry_scores(before, share, after, 99)
    assert carried is not None
    mixed = {query: score for query, score in wanted.items() if query not in share}
    mixed |= made.oracle(share, fewer)
    assert_published(after, [*parts, carried], mixed)


def test_a_graph_without_scores_has_none_and_altered_ones_are_refused(tmp_path: Path) -> None:
    made = Tables(tmp_path)
    uri = str(tmp_path / "graph")
    publish_graph(uri, [], 3)
    assert len(read_query_scores(uri)) == 0
    parts = made.score(uri, np.sort(made.ids), np.sort(made.reference_ids))
    publish_graph(uri, [], 3, info=describe_query_scores(parts))
    (tmp_path / "graph" / parts[1].name).write_bytes(b"altered")
    with pytest.raises(RunError, match=f"{parts[1].name} differs from the published file"):
        read_query_scores(uri)
