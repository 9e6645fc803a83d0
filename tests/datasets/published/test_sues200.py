from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from s4g_ray.datasets.published import sues200
from s4g_ray.errors import InputError
from tests.support.drone_trees import sues_archive, sues_divided
from tests.support.source_trees import rows

COLUMNS = ("id", "place_id", "split", "source_id", "region")


def test_the_archive_converts_value_by_value(tmp_path: Path) -> None:
    source = sues_archive(tmp_path / "source", drones=1)
    notes: list[str] = []
    dataset = sues200.convert(
        str(source), str(tmp_path / "target"), heights="150,300", report=notes.append
    )
    assert (dataset.name, notes) == ("sues200_drone_to_satellite", [])
    # the gallery of the test split: all places, with ids of their own
    assert rows(dataset, "references", *COLUMNS) == [
        (0, 1, "train", "satellite-view/0001/0.png", None),
        (1, 2, "train", "satellite-view/0002/0.png", None),
        (2, 1, "test", "satellite-view/0001/0.png", None),
        (3, 2, "test", "satellite-view/0002/0.png", None),
        (4, 8, "test", "satellite-view/0008/0.png", None),
        (5, 12, "test", "satellite-view/0012/0.png", None),
    ]
    wanted: list[tuple[Any, ...]] = []
    for split, places in (("train", (1, 2)), ("test", (8, 12))):
        for height in (150, 300):
            for place in places:
                path = f"drone_view_512/{place:04d}/{height}/0.jpg"
                wanted.append((len(wanted), place, split, path, f"{height} m"))
    assert rows(dataset, "queries", *COLUMNS) == wanted
    for uri, source_id in rows(dataset, "queries", "uri", "source_id"):
        assert uri.endswith(source_id)


def test_the_divided_layout_gives_the_same_places_and_splits(tmp_path: Path) -> None:
    found = []
    for tree in (sues_archive, sues_divided):
        source = tree(tmp_path / tree.__name__)
        dataset = sues200.convert(
            str(source),
            str(tmp_path / f"{tree.__name__}-target"),
            query_view="satellite",
            reference_view="drone",
            heights="150,300",
        )
        shown = [
            rows(dataset, view, "id", "place_id", "split", "region")
            for view in ("references", "queries")
        ]
        found.append(shown)
    assert found[0] == found[1]
    references, queries = found[0]
    assert [row[1:] for row in queries] == [
        (1, "train", None),
        (2, "train", None),
        (8, "test", None),
        (12, "test", None),
    ]
    assert {(place, split) for _, place, split, _ in references} == {
        *((place, "train") for place in (1, 2)),
        *((place, "test") for place in (1, 2, 8, 12)),
    }


def test_the_published_split_has_120_places_to_train_on() -> None:
    assert len(sues200.TRAIN_PLACES) == 120
    assert set(range(1, 201)) > sues200.TRAIN_PLACES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heights": "150,400"}, "'400' is none of 150, 200, 250, 300"),
        ({"query_view": "satellite"}, "one must be drone, the other satellite"),
        ({"query_view": "street"}, "one must be drone, the other satellite"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sues200.convert(str(tmp_path), str(tmp_path / "target"), **options)
    assert not (tmp_path / "target").exists()
