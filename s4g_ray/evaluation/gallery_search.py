"""Rank references exactly for all queries, over the parts of a gallery: memory O(part + queries).

The first pass computes the scores that matter in float64: those of each query's own references, of
its semi-positives and of the best reference near it. The second counts, part by part, how many
other references score as high. Counts of parts add up, so that the ranks do not depend on the
parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from s4g_ray.arrays import Floats, Floats32, Floats64, Ints
from s4g_ray.data.pairs import Pairs
from s4g_ray.evaluation.gallery_parts import GalleryPart, NearbyReferences, RowsByPlace
from s4g_ray.evaluation.ranking import TIE, Block, normalise, score_pairs
from s4g_ray.evaluation.top_references import TopReferences

BLOCK_SCORES = 16_000_000  # scores in one block of the matrix product: 64 MB


class QuerySide:
    """Q queries, and what their ranks are counted for; ready to search several galleries."""

    def __init__(
        self,
        embeddings: Floats,
        place_ids: Ints,
        *,
        semi_positives: Pairs | None = None,
        latlon: Floats64 | None = None,
        radii_m: Sequence[float] = (),
    ) -> None:
        """embeddings[Q, D], place_ids[Q], latlon[Q, 2] in degrees, NaN where unknown.

        semi_positives pairs queries with places, none of them their own; None without any.
        """
        if embeddings.ndim != 2 or len(embeddings) != len(place_ids):
            raise ValueError(
                f"query embeddings have shape {embeddings.shape}, for {len(place_ids)} places"
            )
        self.vectors = normalise(embeddings, place_ids, "query")
        self.own = RowsByPlace(np.arange(len(place_ids)), place_ids)
        self.semi = None
        if semi_positives is not None:
            self.semi = RowsByPlace(semi_positives.rows, semi_positives.columns)
        self.latlon = latlon
        self.radii_m = sorted(float(radius) for radius in radii_m)
        self.nearby = None
        if latlon is not None and self.radii_m:
            self.nearby = NearbyReferences(latlon, self.radii_m[-1])

    def __len__(self) -> int:
        return len(self.vectors)


@dataclass(frozen=True)
class _PartPairs:
    """The pairs of queries and references of one part, sorted by query."""

    own: Pairs
    semi: Pairs | None
    near: dict[float, Pairs]  # by radius

    @classmethod
    def find(cls, queries: QuerySide, part: GalleryPart) -> _PartPairs:
        near = {}
        if queries.nearby is not None and part.latlon is not None:
            pairs, metres = queries.nearby.find(part.latlon)
            for radius in queries.radii_m:
                inside = metres <= radius
                near[radius] = Pairs(pairs.rows[inside], pairs.columns[inside])
        semi = None if queries.semi is None else queries.semi.find(part.place_ids)
        return cls(queries.own.find(part.place_ids), semi, near)

    @property
    def own_or_semi(self) -> Pairs:
        if self.semi is None:
            return self.own
        rows = np.concatenate([self.own.rows, self.semi.rows])
        columns = np.concatenate([self.own.columns, self.semi.columns])
        order = np.argsort(rows, kind="stable")
        return Pairs(rows[order], columns[order])


class GallerySearch:
    """A search of one gallery: find_scores for every part, then count_part for every part.

    The arrays that count_part fills hold the two protocols first: counts of scores at least as high
    (strict), and of higher ones (paper). They count references other than the query's own.
    """

    def __init__(
        self, queries: QuerySide, num_top: int = 0, *, keeps_positions: bool = False
    ) -> None:
        """num_top: the length of each query's list of references; 0: none is made.

        keeps_positions: whether the coordinates of all references stay in memory.
        """
        self.queries = queries
        self._keeps_positions = keeps_positions
        self._latlon: list[Floats64] = []
        self.num_references = 0
        self._own: list[tuple[Ints, Floats64]] = []
        self._own_references: list[Ints] = []
        self._semi: list[tuple[Ints, Floats64]] = []
        size = len(queries)
        self.best_near = {radius: np.full(size, -np.inf) for radius in queries.radii_m}
        self.top = np.zeros(size, np.int64)  # rows of the gallery
        self.top_latlon = np.full((size, 2), np.nan)
        self._top_score = np.full(size, -np.inf, np.float32)
        self._others = TopReferences(size, num_top) if num_top else None
        self._first = 0  # of the part that is counted
        self._buffer = np.empty(0, np.float32)

    def find_scores(self, part: GalleryPart) -> None:
        """Compute the exact scores of the pairs in a part.

        Raises RunError for embeddings that are not finite, ValueError for shapes that do not fit.
        """
        references = self._normalise(part, self.num_references)
        pairs = _PartPairs.find(self.queries, part)
        self._own_references.append(self.num_references + pairs.own.columns)
        self.num_references += len(references)
        self._own.append((pairs.own.rows, self._score(references, pairs.own)))
        if pairs.semi is not None:
            self._semi.append((pairs.semi.rows, self._score(references, pairs.semi)))
        if not pairs.near:
            return
        widest = pairs.near[self.queries.radii_m[-1]]
        scores = self._score(references, widest)
        keys = widest.rows * len(references) + widest.columns
        for radius, near in pairs.near.items():
            inside = np.searchsorted(keys, near.rows * len(references) + near.columns)
            np.maximum.at(self.best_near[radius], near.rows, scores[inside])

    def begin_counting(self) -> None:
        """Order the scores that references are counted above; call it between the passes."""
        size = len(self.queries)
        rows, scores = _join_scores(self._own)
        order = np.lexsort((-scores, rows))
        self.own_rows = rows[order]
        self.own_scores = scores[order]
        self.own_references = np.concatenate([np.zeros(0, np.int64), *self._own_references])[order]
        self._own_references.clear()
        self.own_above = np.zeros((2, len(rows)), np.int64)
        self.best_own = np.full(size, -np.inf)
        np.maximum.at(self.best_own, rows, scores)
        self.semi_rows, self.semi_scores = _join_scores(self._semi)
        self.best_literal = self.best_own.copy()
        np.maximum.at(self.best_literal, self.semi_rows, self.semi_scores)
        self.literal_above = np.zeros((2, size), np.int64)
        self.near_above = {radius: np.zeros((2, size), np.int64) for radius in self.best_near}

    def count_part(self, part: GalleryPart) -> None:
        """Count the references of a part that score as high, and find the top ones."""
        references = self._normalise(part, self._first)
        if not len(references):
            return
        if self._keeps_positions:
            unknown = np.full((len(references), 2), np.nan)
            self._latlon.append(unknown if part.latlon is None else part.latlon)
        pairs = _PartPairs.find(self.queries, part)
        literal = pairs.own_or_semi if pairs.semi is not None else None
        step = max(1, BLOCK_SCORES // len(references))
        for start in range(0, len(self.queries), step):
            rows = slice(start, min(start + step, len(self.queries)))
            block = Block(self.queries.vectors[rows], references, self._take_buffer(rows, part))
            self._update_top(block, rows, part)
            first, last = np.searchsorted(self.own_rows, [rows.start, rows.stop])
            self.own_above[:, first:last] += block.count_above(
                self.own_rows[first:last] - start,
                self.own_scores[first:last],
                pairs.own.take(rows),
            )
            if literal is not None:
                self.literal_above[:, rows] += _count_above_best(
                    block, self.best_literal[rows], literal.take(rows)
                )
            for radius, near in pairs.near.items():
                self.near_above[radius][:, rows] += _count_above_best(
                    block, self.best_near[radius][rows], near.take(rows)
                )
            if self._others is not None:
                # last: it overwrites the scores of own references
                self._others.add_block(block, start, self._first, pairs.own.take(rows))
        self._first += len(references)

    def _normalise(self, part: GalleryPart, first: int) -> Floats32:
        references = normalise(part.vectors, part.place_ids, "reference", first)
        if references.shape[1] != self.queries.vectors.shape[1]:
            raise ValueError(
                f"D differs: queries {self.queries.vectors.shape[1]}, references"
                f" {references.shape[1]}; embed both with one model"
            )
        return references

    def _score(self, references: Floats32, pairs: Pairs) -> Floats64:
        return score_pairs(self.queries.vectors, references, pairs)

    def _take_buffer(self, rows: slice, part: GalleryPart) -> Floats32:
        """Return room for the scores of a block; the next block uses it again."""
        shape = (rows.stop - rows.start, len(part.place_ids))
        if len(self._buffer) < shape[0] * shape[1]:
            self._buffer = np.empty(shape[0] * shape[1], np.float32)
        return self._buffer[: shape[0] * shape[1]].reshape(shape)

    def _update_top(self, block: Block, rows: slice, part: GalleryPart) -> None:
        """Keep the references that score highest; of equal ones that of the earlier part."""
        columns = block.find_top()
        scores = block.scores[np.arange(len(columns)), columns]
        better = scores > self._top_score[rows]
        chosen = rows.start + np.flatnonzero(better)
        self._top_score[chosen] = scores[better]
        self.top[chosen] = self._first + columns[better]
        if part.latlon is not None:
            self.top_latlon[chosen] = part.latlon[columns[better]]

    def list_top(self) -> TopReferences | None:
        """List the first references of each query, its own where `strict` ranks them.

        Of references that tie, its own come last, and the others in the order of the gallery.
        """
        if self._others is None:
            return None
        first = np.searchsorted(self.own_rows, self.own_rows)
        positions = self.own_above[0] + np.arange(len(first)) - first
        return self._others.insert(self.own_rows, self.own_references, self.own_scores, positions)

    def find_positions(self, rows: Ints) -> Floats64:
        """Return the coordinates of rows of the gallery: degrees [..., 2], NaN for row -1."""
        latlon = np.concatenate([*self._latlon, np.full((1, 2), np.nan)])
        return np.asarray(latlon[rows])

    def count_semi_above(self, *, strict: bool) -> Ints:
        """Count the semi-positives of each query that score above its best own reference."""
        best = self.best_own[self.semi_rows]
        is_above = self.semi_scores >= best - TIE if strict else self.semi_scores > best + TIE
        return np.bincount(self.semi_rows[is_above], minlength=len(self.queries))


def _join_scores(found: list[tuple[Ints, Floats64]]) -> tuple[Ints, Floats64]:
    """Join the rows and scores that were found in parts, and empty the list."""
    rows = np.concatenate([np.zeros(0, np.int64), *(rows for rows, _ in found)])
    scores = np.concatenate([np.zeros(0), *(scores for _, scores in found)])
    found.clear()
    return rows, scores


def _count_above_best(block: Block, best: Floats64, members: Pairs) -> Ints:
    """Count the references above the best[b] of each query, counts[2, b]; 0 where it has none."""
    rows: Ints = np.flatnonzero(np.isfinite(best))
    above = np.zeros((2, len(best)), np.int64)
    above[:, rows] = block.count_above(rows, best[rows], members)
    return above


def rank_found(best: Floats64, above: Ints) -> Ints:
    """Return ranks[2, Q] from 1, given counts above[2, Q]; 0 where best[Q] is minus infinity."""
    return np.where(np.isfinite(best), above + 1, 0)
