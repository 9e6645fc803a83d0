"""Measure mining within geographic cells against mining among all references: time and neighbors.

    python -m benchmarks.mining_cells [--counts 12500 25000 50000 100000]

The tasks of both run one after the other in this process, without Ray, on a table of vectors whose
similarity has three parts: one falls with the distance on the ground (--scale-m), one is shared by
places of a kind, anywhere (--kinds), and one is each place's own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable

import numpy as np

from benchmarks.support.record import Cell, record
from s4g_ray.arrays import Floats32, Ints
from s4g_ray.config.schema import MiningConfig
from s4g_ray.data.places import Places
from s4g_ray.data.sphere import EARTH_RADIUS_M, unit_sphere
from s4g_ray.data.tables.embedding_table import encode_part
from s4g_ray.data.tables.neighbor_graph import read_graph_part
from s4g_ray.index.exact_search import search, unit_rows
from s4g_ray.mining.candidates import Filters, References, Widths
from s4g_ray.mining.cells.cell_plan import CellPlan
from s4g_ray.mining.cells.cell_tasks import (
    CellMining,
    deal_rows,
    mine_block,
    plan_blocks,
    plan_dealing,
)
from s4g_ray.mining.group_tasks import GlobalMining, MiningJob, mine_group
from s4g_ray.mining.job_plan import MinedPart, MiningPlan
from s4g_ray.pipeline.rounds.cell_search import ExactReferences
from s4g_ray.storage.manifest import Part, Stamp, open_published, publish, write_part

PART_ROWS = 16_384
SPACING_M = 60.0  # between places of a town, about
TOWN_PLACES = 2_000


class ExactIndex:
    """All references, searched exactly in this process."""

    def __init__(self, vectors: Floats32, threads: int) -> None:
        self._vectors = unit_rows(vectors)
        self._ids = np.arange(len(vectors))
        self._threads = threads

    def search(self, _: int, queries: Floats32, k: int) -> tuple[Ints, Floats32]:
        """queries[M, D] -> ids[M, k], scores[M, k]."""
        found: tuple[Ints, Floats32] = search(
            unit_rows(queries),
            self._vectors,
            self._ids,
            k,
            engine="torch",
            num_threads=self._threads,
        )
        return found


def draw_places(count: int) -> Places:
    """Draw places in towns; their ids follow no order on the ground."""
    rng = np.random.default_rng(0)
    num_towns = max(1, count // TOWN_PLACES)
    centres = np.stack([rng.uniform(40, 55, num_towns), rng.uniform(-5, 25, num_towns)], axis=1)
    side = np.degrees(SPACING_M * np.sqrt(TOWN_PLACES) / EARTH_RADIUS_M)
    at = centres[rng.integers(num_towns, size=count)] + rng.uniform(0, side, (count, 2))
    return Places(np.arange(count), at[:, 0], at[:, 1])


def draw_vectors(places: Places, dim: int, scale_m: float, kinds: int) -> tuple[Floats32, Floats32]:
    """Draw queries[P, D] and references[P, D], of which row i is place i."""
    rng = np.random.default_rng(1)
    xyz = unit_sphere(places.lat, places.lon)
    # cosine features: the inner product falls with the distance as exp(-(d / scale)^2 / 2)
    waves = rng.standard_normal((3, dim)) * (EARTH_RADIUS_M / scale_m)
    ground = np.cos(xyz @ waves + rng.uniform(0, 2 * np.pi, dim)) * np.sqrt(2)
    kind = rng.standard_normal((kinds, dim))[rng.integers(kinds, size=len(places))]
    own = rng.standard_normal((len(places), dim))
    place = ground + kind + own
    queries = place + rng.standard_normal(place.shape)
    references = place + rng.standard_normal(place.shape)
    return queries.astype(np.float32), references.astype(np.float32)


def write_table(folder: str, queries: Floats32, references: Floats32, stamp: Stamp) -> None:
    """Publish an embedding table in the order of places."""
    parts: list[Part] = []
    for view, vectors in (("queries", queries), ("references", references)):
        unit = unit_rows(vectors)
        for number, start in enumerate(range(0, len(unit), PART_ROWS)):
            ids = np.arange(start, min(start + PART_ROWS, len(unit)))
            data = encode_part(ids, ids, unit[ids], stamp.dtype)
            parts.append(write_part(folder, f"{view}/part-{number:05d}.parquet", data, len(ids)))
    publish(folder, "embeddings", parts, stamp, {})


def measure_recall(folder: str, wanted: list[MinedPart], found: list[MinedPart]) -> float:
    """Return the share of the neighbors of one graph that another has too."""
    graphs = []
    for target, outcomes in ((f"{folder}/global", wanted), (f"{folder}/cells", found)):
        rows: dict[int, Ints] = {}
        for outcome in outcomes:
            assert outcome.part is not None
            graph = read_graph_part(target, outcome.part)
            for i, place in enumerate(graph.places.tolist()):
                rows[place] = graph.ids[graph.offsets[i] : graph.offsets[i + 1]]
        graphs.append(rows)
    shared = sum(len(np.intersect1d(row, graphs[1][place])) for place, row in graphs[0].items())
    return shared / sum(map(len, graphs[0].values()))


def ignore_block(num_queries: int) -> None:
    """Do nothing after a block of queries."""


def measure(work: Callable[[], list[MinedPart]]) -> tuple[list[MinedPart], float]:
    """Run tasks; return their outcomes and the seconds of processor time."""
    started = time.process_time()
    outcomes = work()
    return outcomes, time.process_time() - started


def measure_row(count: int, options: argparse.Namespace) -> list[Cell]:
    """Measure a row of the table."""
    cfg = MiningConfig(
        scope="cells",
        cell_places=options.cell_places,
        far_references=options.far,
        index_threads=options.threads,
    )
    places = draw_places(count)
    queries, references = draw_vectors(places, options.dim, options.scale_m, options.kinds)
    stamp = Stamp(0, "w", "p", "d", options.dim, "float16")
    with tempfile.TemporaryDirectory() as folder:
        write_table(f"{folder}/e", queries, references, stamp)
        known = References(places.ids, places.ids)
        widths = Widths.from_references(known, Filters(options.k), cfg.max_candidates)
        plan = MiningPlan.from_embeddings(f"{folder}/e", places.ids, cfg, options.k, stamp)

        def make_job(name: str) -> MiningJob:
            target = f"{folder}/{name}"
            return MiningJob(
                0, f"{folder}/e", target, cfg, options.k, widths, places.ids, known, None, None
            )

        def mine_global() -> list[MinedPart]:
            shared = GlobalMining(make_job("global"), ExactIndex(references, options.threads))
            return [mine_group(shared, row, ignore_block) for row in plan.rows]

        def mine_cells() -> list[MinedPart]:
            cells = CellPlan.from_places(places, plan.places, known, cfg, options.k, (0, 0))
            exact = ExactReferences("torch", options.threads)
            shared = CellMining(make_job("cells"), exact, cells, options.dim, "float16")
            dealing = plan_dealing(open_published(f"{folder}/e", "embeddings").parts)
            dealt = [deal_rows(shared, row, ignore_block) for row in dealing]
            blocks = plan_blocks(cells, dealing, dealt)
            return [mine_block(shared, row, ignore_block) for row in blocks]

        whole, global_s = measure(mine_global)
        found, cells_s = measure(mine_cells)
        recall = measure_recall(folder, whole, found)
    return [
        count,
        f"{global_s:.1f} s",
        f"{cells_s:.1f} s",
        f"{1e6 * global_s / count:.0f}",
        f"{1e6 * cells_s / count:.0f}",
        f"{recall:.1%}",
    ]


def main() -> None:
    """Measure and record the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--counts", type=int, nargs="*", default=[12_500, 25_000, 50_000, 100_000])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--k", type=int, default=128)
    parser.add_argument("--cell-places", type=int, default=512)
    parser.add_argument("--far", type=int, default=512)
    parser.add_argument("--scale-m", type=float, default=500.0)
    parser.add_argument("--kinds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    measure_row(2_000, options)  # compiles
    record(
        "mining_cells",
        title="Mining within geographic cells",
        text=(
            "a round with `mining.scope: cells`, dealing the table included, against exact search"
            " among all references: processor time, all and for each place, and the share of the"
            " neighbors among all references that were found. Similarity falls with the distance,"
            " and places of a kind resemble each other anywhere: only a share of those can be found"
            " in cells."
        ),
        command="python -m benchmarks.mining_cells",
        columns=[
            "places",
            "global",
            "cells",
            "global, us a place",
            "cells, us a place",
            "global neighbors found",
        ],
        rows=[measure_row(count, options) for count in options.counts],
        config={
            "D": options.dim,
            "k": options.k,
            "cell_places": options.cell_places,
            "far_references": options.far,
            "scale_m": options.scale_m,
            "kinds": options.kinds,
            "threads": options.threads,
        },
        order=21,
    )


if __name__ == "__main__":
    main()
