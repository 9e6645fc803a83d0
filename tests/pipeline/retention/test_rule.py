"""No artefact that a later step reads is removed, and what stays does not grow with the run."""

from __future__ import annotations

import random
from typing import Any

from s4g_ray.pipeline.retention.artefacts import Keep
from s4g_ray.pipeline.retention.rule import (
    RunState,
    removable_embeddings,
    removable_graphs,
    removable_indexes,
    removable_plans,
)
from s4g_ray.pipeline.rounds.schedule import Schedule
from tests.conftest import tiny_config
from tests.support.simulated_run import SimulatedRun


def draw_schedule(rng: random.Random) -> Schedule:
    every = rng.randint(1, 4)
    lag = rng.randint(0, 5)
    overlaps = rng.random() < 0.7
    least = max(1, every + (lag if overlaps else 0) - 1)
    mining: dict[str, Any] = {
        "every_epochs": every,
        "lag_epochs": lag,
        "schedule": "overlap" if overlaps else "sync",
        "when_late": rng.choice(["wait", "reuse", "reuse"]),
        "max_staleness_epochs": rng.choice([None, least + rng.randint(0, 8)]),
    }
    return make_schedule(
        mining,
        rng.randint(1, 16),
        rng.choice([*["similarity"] * 8, "geographic", "random"]),
        rng.randint(1, 3),
        rng.randint(1, 5),
    )


def make_schedule(
    mining: dict[str, Any],
    epochs: int = 12,
    mode: str = "similarity",
    checkpoints: int = 2,
    evaluate_every: int = 4,
) -> Schedule:
    config = tiny_config(
        "x",
        "y",
        train={"epochs": epochs},
        sampling={"mode": mode},
        mining=mining,
        checkpoint={"keep": checkpoints},
        evaluation={"every_epochs": evaluate_every},
    )
    return Schedule(config)


def test_nothing_that_a_later_step_reads_is_removed_in_any_schedule_order_or_crash() -> None:
    for seed in range(400):
        rng = random.Random(seed)
        schedule = draw_schedule(rng)
        keep = Keep(*rng.choices([0, 0, 0, 1, 2], k=3))
        failures = rng.choice([0.0, 0.0, 0.3])
        crashes = rng.randint(0, 3)
        run = SimulatedRun(schedule, keep, seed=seed, crashes=crashes, failures=failures)
        run.run()


def test_the_artefacts_of_a_long_run_are_bounded() -> None:
    schedule = make_schedule({"schedule": "overlap", "every_epochs": 1, "lag_epochs": 1}, 60)
    run = SimulatedRun(schedule, Keep(0, 0, 0), seed=1, crashes=0, failures=0)
    run.run()
    assert run.most["graphs"] <= 5
    assert run.most["plans"] <= 4
    assert run.most["embeddings"] <= 3


def test_what_is_left_at_the_end_does_not_depend_on_when_it_was_removed() -> None:
    for seed in range(60):
        schedule = draw_schedule(random.Random(seed))
        if schedule.config.mining.when_late == "reuse" and schedule.overlaps:
            continue  # rounds that no epoch waits for are left out
        runs: list[SimulatedRun] = []
        for crashes in (0, 0, 2):
            run = SimulatedRun(
                schedule, Keep(1, 1, 1), seed=seed + 100 * len(runs), crashes=crashes, failures=0
            )
            run.run()
            runs.append(run)
        for run in runs:
            if run.best == runs[0].best:
                assert run.graphs == runs[0].graphs
                assert run.plans == runs[0].plans
                assert run.embeddings == runs[0].embeddings


def test_keep_adds_the_newest_of_those_that_are_not_needed() -> None:
    schedule = make_schedule({"every_epochs": 1})
    state = RunState(8, frozenset({0, 7, 8}), frozenset(range(9)), evaluated=4)
    there = list(range(9))
    assert removable_graphs(schedule, state, there, 0) == [0, 1, 2, 3, 4, 5, 6]
    assert removable_graphs(schedule, state, there, 2) == [0, 1, 2, 3, 4]
    assert removable_embeddings(state, there, 0) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert removable_embeddings(state, there, 1) == [0, 1, 2, 3, 5, 6, 7]
    assert removable_plans(state, there, 0) == list(range(8))
    assert removable_plans(state, [*there, 9, 10], 1) == list(range(7))


def test_a_round_that_is_not_done_keeps_its_tables_its_index_and_the_graph_before() -> None:
    schedule = make_schedule({"every_epochs": 2, "schedule": "overlap", "lag_epochs": 1})
    state = RunState(9, frozenset({0, 9}), frozenset({0, 4, 6}), pending=frozenset({8}))
    assert removable_graphs(schedule, state, [0, 2, 4, 6, 8], 0) == [0, 2, 4]
    assert removable_embeddings(state, [4, 6, 8], 0) == [4, 6]
    assert removable_indexes(state, [6, 8]) == [6]
