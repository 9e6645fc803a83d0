from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from s4g_ray.datasets.inspection.count_checks import PUBLISHED
from s4g_ray.datasets.inspection.dataset_checks import inspect_dataset
from s4g_ray.datasets.inspection.findings import findings_table
from s4g_ray.errors import InputError
from tests.support.inspected_datasets import (
    NUM_TEST,
    NUM_TRAIN,
    clean_tables,
    levels_of,
    only_finding,
    write_small,
)


def test_a_clean_data_set_has_no_fault_and_no_note_and_is_plain_json(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    uri = write_small(tmp_path / "d", clean_tables())
    found = inspect_dataset(
        uri, decode=True, on_progress=lambda done, total: calls.append((done, total))
    )
    assert levels_of(found) == {"ok"}, found
    assert found.ok
    assert calls == [(1, 2), (2, 2), *((i, 20) for i in range(1, 21))]
    value = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert (value["name"], value["ok"], value["uri"]) == ("small", True, uri)
    by_topic = {finding["topic"]: finding for finding in value["findings"]}
    assert by_topic["schema"]["values"]["filled"]["coordinates"] == 20
    assert "empty: region, byte ranges, heading, semi-positives" in by_topic["schema"]["text"]
    assert by_topic["counts"]["values"]["queries"] == {"train": 6, "test": 4}
    sizes = [f.values for f in found.findings if "height x width" in f.text]
    assert sizes == [{"references": {"8x12": 10}, "queries": {"8x12": 10}}]


def test_leakage_by_distance_and_by_place_is_noted(tmp_path: Path) -> None:
    tables = clean_tables()
    queries = tables["queries"]
    queries["lon"][7] = queries["lon"][2] + 1e-4  # 11 m
    queries["lon"][9] = queries["lon"][3] + 2e-4  # 22 m
    queries["lat"][8] = queries["lon"][8] = None
    queries["place_id"][6] = 100
    uri = write_small(tmp_path / "d", tables)
    near, shared = [
        f for f in inspect_dataset(uri).findings if (f.topic, f.level) == ("leakage", "note")
    ]
    assert near.values["near"] == 2
    assert near.values["share"] == 0.5
    assert near.values["without_coordinates"] == {"test": 1, "train": 0}
    assert near.examples == (
        "query id 7 (place 107): 11.1 m from train query id 2 (place 102)",
        "query id 9 (place 109): 22.2 m from train query id 3 (place 103)",
    )
    assert shared.values == {"split": "test", "places": 4, "shared": 1}
    assert shared.examples == ("place_ids 100",)
    closer = inspect_dataset(uri, leak_radius_m=15.0)
    assert [f.values["near"] for f in closer.findings if "near" in f.values] == [1]


def test_without_coordinates_a_note_reports_that_nearness_is_not_checked(tmp_path: Path) -> None:
    tables = clean_tables()
    for table in tables.values():
        del table["lat"], table["lon"]
    found = inspect_dataset(write_small(tmp_path / "d", tables))
    assert only_finding(found, "coordinates", "ok").text == "no row has coordinates"
    assert "not checked" in only_finding(found, "leakage", "note").text


def test_a_query_far_from_its_place_is_a_note_with_its_id(tmp_path: Path) -> None:
    tables = clean_tables()
    tables["queries"]["lat"][4] = 1.0
    note = only_finding(inspect_dataset(write_small(tmp_path / "d", tables)), "coordinates", "note")
    assert note.text.endswith("1 query over 1,000 m, the farthest query id 4 (place 104)")
    assert note.values["max_m"] == pytest.approx(111_195, rel=1e-4)
    assert note.values["median_m"] == pytest.approx(11.12, rel=1e-3)
    assert note.examples == ("query id 4 (place 104): 111,195 m from reference id 4",)


def test_counts_and_extents_are_given_by_region_and_partly_missing_coordinates_noted(
    tmp_path: Path,
) -> None:
    tables = clean_tables()
    for table in tables.values():
        table["region"] = ["fiji"] * NUM_TRAIN + ["kiribati"] * (NUM_TEST - 1) + [None]
        table["lon"] = [179.98 + 0.01 * i - 360.0 * (i >= 3) for i in range(10)]
    tables["references"]["lat"][9] = tables["references"]["lon"][9] = None
    found = inspect_dataset(write_small(tmp_path / "d", tables))
    counts = only_finding(found, "counts", "ok")
    assert counts.values["regions"]["kiribati"] == {
        "queries": {"test": 3},
        "references": {"test": 3},
    }
    assert counts.examples[0] == "fiji: queries: train 6; references: train 6"
    note = only_finding(found, "coordinates", "note")
    assert note.values["without"] == {"references": 1, "queries": 0}
    assert "over the antimeridian" in note.examples[0]
    assert note.values["regions"]["fiji"]["west"] == 179.98
    assert note.values["regions"]["kiribati"]["west"] == pytest.approx(-179.96)


def test_places_without_their_other_view_are_noted(tmp_path: Path) -> None:
    tables = clean_tables()
    tables["references"]["split"][8] = "gallery"
    tables["references"]["place_id"][9] = 999
    tables["queries"]["place_id"][1] = 100
    found = inspect_dataset(write_small(tmp_path / "d", tables))
    unused, unmatched = [f for f in found.findings if (f.topic, f.level) == ("places", "note")]
    assert (unused.examples, unused.values) == ((), {"unused": 1})  # harmless: no ids
    assert unmatched.values == {"split": "test", "unmatched": 1, "queries": 4}
    assert unmatched.examples == ("query id 9 (place 109)",)
    assert only_finding(found, "places", "ok").values == {
        "train_places": 5,
        "mean_queries": 1.2,
        "max_queries": 2,
    }


def test_counts_are_compared_with_the_published_ones_where_the_name_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = only_finding(
        inspect_dataset(write_small(tmp_path / "a", clean_tables(), "vigor_same_corrected")),
        "counts",
        "note",
    )
    assert note.examples[0] == "queries train 6, published 52,609 (-52,603)"
    assert note.values["references test+gallery"] == {"published": 90_618, "found": 4}
    monkeypatch.setitem(PUBLISHED, "small", {"queries train": 6, "references test+gallery": 4})
    found = inspect_dataset(write_small(tmp_path / "b", clean_tables()))
    assert "as published for small" in [f.text for f in found.findings if f.topic == "counts"]
    assert levels_of(found) == {"ok"}
    assert sum(PUBLISHED["vigor_cross"].values()) == 105_214


def test_a_data_set_without_queries_can_be_inspected(tmp_path: Path) -> None:
    tables = clean_tables()
    for column, values in tables["queries"].items():
        tables["queries"][column] = pa.array([], pa.array(values).type)
    found = inspect_dataset(write_small(tmp_path / "d", tables), decode=True)
    assert found.ok
    assert only_finding(found, "places", "note").values == {"unused": 6}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leak_radius_m": -1.0}, r"--leak-radius-m -1 is not within 0\.\."),
        ({"leak_radius_m": float("nan")}, "--leak-radius-m nan"),
        ({"num_threads": 0}, "--threads 0 is below 1"),
    ],
)
def test_impossible_options_and_a_missing_data_set_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        inspect_dataset(str(tmp_path / "none"), **options)
    with pytest.raises(InputError, match="no data set at"):
        inspect_dataset(str(tmp_path / "none"))


def test_the_table_fits_a_hundred_columns(tmp_path: Path) -> None:
    tables = clean_tables()
    tables["queries"]["uri"][1] = "queries/[bold]0[/bold].png"
    tables["queries"]["uri"][2] = "queries/[bold]0[/bold].png"
    found = inspect_dataset(write_small(tmp_path / "d", tables))
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(findings_table(found))
    lines = [line.strip() for line in capture.get().splitlines()]
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert "counts      │ queries: train 6, test 4; references: train 6, test 4" in text
    assert "fault │ duplicates  │ 1 image in several rows of different places" in text
    assert "queries/[bold]0[/bold].png" in text
    assert "│   query id 1 (place 101)" in text  # indented below its sentence
