from __future__ import annotations

from typing import Any

from s4g_ray.pipeline.loggers.points import Point, PointReader
from s4g_ray.pipeline.records import parse_record


def read(reader: PointReader, kind: str, **values: Any) -> Point:
    point = reader.read(parse_record({"kind": kind, "time": 5.0, **values}))
    assert point is not None
    return point


def test_a_step_is_a_point_of_its_numbers() -> None:
    point = read(PointReader(), "step", epoch=2, step=7, loss=0.5, learning_rate=1e-3, other=None)
    assert point == Point(
        key="step 7",
        step=7,
        time=5.0,
        values={"step/loss": 0.5, "step/learning_rate": 1e-3},
        is_step=True,
        epoch=2,
    )


def test_a_record_about_an_epoch_stands_at_the_epochs_last_step() -> None:
    reader = PointReader()
    assert read(reader, "evaluation", epoch=0, ap=0.1).step == 0
    read(reader, "epoch", epoch=1, step=6, loss=1.0)
    read(reader, "step", epoch=2, step=9, loss=1.0)  # training goes on beside the round
    assert read(reader, "evaluation", epoch=1, ap=0.2).step == 6
    assert read(reader, "round", epoch=1, embed_s=2.0).step == 6
    assert read(reader, "lost", ranks=[1], reason="killed").step == 9
    assert read(reader, "workers", after_step=7, workers=2).step == 7


def test_nested_numbers_have_longer_names_and_text_has_none() -> None:
    point = read(
        PointReader(),
        "evaluation",
        epoch=0,
        protocol="strict",
        regions={"North Sea": {"recall@1": 0.5}},
        paper={"recall@1": 0.75},
        **{"recall@1%": 0.25},
    )
    assert point.values == {
        "evaluation/regions/North Sea/recall@1": 0.5,
        "evaluation/paper/recall@1": 0.75,
        "evaluation/recall@1%": 0.25,
    }


def test_graphs_of_two_collections_are_two_points_with_names_of_their_own() -> None:
    reader = PointReader()
    points = [
        read(reader, "mining", epoch=1, collection=name, coverage=0.5, index="flat")
        for name in ("pairs", "gallery")
    ]
    assert [dict(point.values) for point in points] == [
        {"mining/pairs/coverage": 0.5},
        {"mining/gallery/coverage": 0.5},
    ]
    assert len({point.key for point in points}) == 2


def test_a_repeated_record_has_the_key_of_the_first_and_an_event_has_its_own() -> None:
    def keys(time: float) -> list[str]:
        reader = PointReader()
        lines: list[dict[str, Any]] = [
            {"kind": "evaluation", "epoch": 1, "ap": 0.5},
            {"kind": "round_failed", "epoch": 1, "attempt": 1},
            {"kind": "lost", "ranks": [0]},
        ]
        found = [reader.read(parse_record({**line, "time": time})) for line in lines]
        return [point.key for point in found if point is not None]

    first = keys(1.0)
    second = keys(2.0)
    assert len(first) == 3
    assert first[0] == second[0]
    assert not set(first[1:]) & set(second[1:])


def test_records_without_numbers_and_bad_images_give_no_point() -> None:
    reader = PointReader()
    assert reader.read(parse_record({"kind": "note", "time": 1.0, "text": "a"})) is None
    assert reader.read(parse_record({"kind": "bad_images", "new": 2})) is None
