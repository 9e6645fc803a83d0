from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from rich.console import Console

from s4g_ray.data.dataset import write_dataset
from s4g_ray.data.image_table import View
from s4g_ray.datasets.inspection.count_checks import PUBLISHED
from s4g_ray.datasets.inspection.dataset_checks import inspect_dataset
from s4g_ray.datasets.inspection.findings import Finding, Inspection, findings_table
from s4g_ray.errors import InputError
from s4g_ray.storage import files

NUM_TRAIN, NUM_TEST = 6, 4
Tables = dict[View, dict[str, Any]]


def clean_tables() -> Tables:
    """Ten places on a line of latitude, about 1.1 km apart; a query stands 11 m north of its reference."""
    count = NUM_TRAIN + NUM_TEST
    tables: Tables = {}
    norths: dict[View, float] = {"references": 0.0, "queries": 1e-4}
    for view, north in norths.items():
        tables[view] = {
            "id": list(range(count)),
            "place_id": [100 + i for i in range(count)],
            "uri": [f"{view}/{i}.png" for i in range(count)],
            "lat": [north] * count,
            "lon": [0.01 * i for i in range(count)],
            "split": ["train"] * NUM_TRAIN + ["test"] * NUM_TEST,
        }
    return tables


def draw(path: Path, size: tuple[int, int] = (12, 8)) -> None:
    """A picture that no other path has, of (width, height) pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    color = tuple(hashlib.sha256(str(path).encode()).digest()[:3])
    Image.new("RGB", size, color).save(path)


def write(folder: Path, tables: Tables, name: str = "small", *, images: bool = True) -> str:
    """Write tables and a picture for each relative uri that has none yet."""
    for uri in [uri for table in tables.values() for uri in table["uri"]] if images else []:
        if "://" not in uri and not (folder / uri).exists():
            draw(folder / uri)
    return write_tables(str(folder), tables, name)


def write_tables(uri: str, tables: Tables, name: str) -> str:
    return write_dataset(
        uri, pa.table(tables["references"]), pa.table(tables["queries"]), name=name
    ).uri


def only(inspection: Inspection, topic: str, level: str) -> Finding:
    """The one finding of a topic and level."""
    (finding,) = [f for f in inspection.findings if (f.topic, f.level) == (topic, level)]
    return finding


def levels(inspection: Inspection) -> set[str]:
    return {finding.level for finding in inspection.findings}


def test_a_clean_data_set_has_no_fault_and_no_note_and_is_plain_json(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    uri = write(tmp_path / "d", clean_tables())
    found = inspect_dataset(
        uri, decode=True, on_progress=lambda done, total: calls.append((done, total))
    )
    assert levels(found) == {"ok"}, found
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


def test_without_decode_no_image_is_opened_and_each_folder_is_listed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = write(tmp_path / "d", clean_tables())
    for png in (tmp_path / "d").rglob("*.png"):
        png.write_bytes(b"no picture")
    listed: list[str] = []
    list_names, read_bytes = files.list_names, files.read_bytes

    def counted(folder: str) -> list[str]:
        listed.append(folder)
        return list_names(folder)

    def guarded(path: str, *part: int) -> bytes:
        assert not path.endswith(".png"), path
        return read_bytes(path, *part)

    monkeypatch.setattr(files, "list_names", counted)
    monkeypatch.setattr(files, "read_bytes", guarded)
    assert inspect_dataset(uri).ok
    assert sorted(
        folder for folder in listed if not folder.startswith(f"{uri}/references/part")
    ) == sorted(
        [f"{uri}/references", f"{uri}/queries"]
        * 2  # once for its Parquet files, once for its images
    )


def test_missing_files_are_faults_and_are_not_decoded(tmp_path: Path) -> None:
    tables = clean_tables()
    tables["queries"]["uri"][3] = "nowhere/3.png"
    uri = write(tmp_path / "d", tables)
    (tmp_path / "d/nowhere/3.png").unlink()
    (tmp_path / "d/nowhere").rmdir()
    (tmp_path / "d/references/7.png").unlink()
    found = inspect_dataset(uri, decode=True)
    fault = only(found, "images", "fault")
    assert not found.ok
    assert fault.values == {"files": 20, "missing": 2, "rows": 2}
    assert fault.text == "2 of 20 image files missing, of 2 rows"
    assert fault.examples == (
        "reference id 7 (place 107) references/7.png: missing",
        "query id 3 (place 103) nowhere/3.png: missing",
    )
    assert [f.values["images"] for f in found.findings if "undecodable" in f.values] == [18]


def test_only_the_first_ten_examples_are_kept(tmp_path: Path) -> None:
    uri = write(tmp_path / "d", clean_tables(), images=False)
    fault = only(inspect_dataset(uri), "images", "fault")
    assert (fault.values["missing"], len(fault.examples)) == (20, 10)


def test_a_folder_that_cannot_be_listed_gives_its_reason(tmp_path: Path) -> None:
    tables = clean_tables()
    tables["queries"]["uri"][0] = "nosuch://bucket/0.png"
    fault = only(inspect_dataset(write(tmp_path / "d", tables)), "images", "fault")
    assert fault.values["missing"] == 1
    assert "ValueError: Protocol not known: nosuch" in fault.examples[0]


def test_undecodable_images_are_faults_with_reasons_and_sizes_are_told(tmp_path: Path) -> None:
    uri = write(tmp_path / "d", clean_tables())
    (tmp_path / "d/queries/2.png").write_bytes(b"")
    (tmp_path / "d/queries/5.png").write_bytes(b"text")
    for i in range(7):
        draw(tmp_path / f"d/references/{i}.png", (20 + i, 10))
    found = inspect_dataset(uri, decode=True, num_threads=3)
    fault = only(found, "images", "fault")
    assert fault.text == "2 of 20 images cannot be decoded"
    assert fault.examples == (
        "query id 2 (place 102) queries/2.png: the file is empty",
        "query id 5 (place 105) queries/5.png: not an image file of a known format",
    )
    (sizes,) = [f for f in found.findings if "height x width" in f.text]
    assert sizes.values["queries"] == {"8x12": 8}
    assert sizes.values["references"] == {"8x12": 3, "10x20": 1, "10x21": 1, "10x22": 1, "10x23": 1}
    assert "and 3 more" in sizes.text


def test_byte_ranges_are_read_as_ranges_and_their_container_must_be_there(tmp_path: Path) -> None:
    tables = clean_tables()
    folder = tmp_path / "d"
    parts = []
    for uri in tables["queries"]["uri"]:
        draw(folder / uri)
        parts.append((folder / uri).read_bytes())
    starts = np.cumsum([0, *map(len, parts)])
    (folder / "shard.tar").write_bytes(b"".join(parts))
    tables["queries"] |= {
        "uri": ["shard.tar"] * 10,
        "offset": starts[:-1].tolist(),
        "length": [len(part) for part in parts],
    }
    uri = write(folder, tables)
    found = inspect_dataset(uri, decode=True)
    assert levels(found) == {"ok"}
    assert only(found, "schema", "ok").values["filled"]["byte ranges"] == 10
    (folder / "shard.tar").write_bytes(b"".join(parts)[:-5])
    fault = only(inspect_dataset(uri, decode=True), "images", "fault")
    assert f"shard.tar at byte {starts[9]}" in fault.examples[0]
    assert "bytes wanted" in fault.examples[0]
    (folder / "shard.tar").unlink()
    assert only(inspect_dataset(uri), "images", "fault").values == {
        "files": 11,
        "missing": 1,
        "rows": 10,
    }


def test_equal_content_at_different_uris_is_noted_with_places_and_splits(tmp_path: Path) -> None:
    uri = write(tmp_path / "d", clean_tables())
    for copied, of in ((1, 0), (7, 3)):  # within train; between train and test
        (tmp_path / f"d/queries/{copied}.png").write_bytes(
            (tmp_path / f"d/queries/{of}.png").read_bytes()
        )
    note = only(inspect_dataset(uri, decode=True), "duplicates", "note")
    assert note.values == {
        "images": 4,
        "contents": 2,
        "of_several_places": 2,
        "in_train_and_held_out": 1,
    }
    assert (
        note.examples[1]
        == "query id 3 (place 103) queries/3.png = query id 7 (place 107) queries/7.png"
    )


@pytest.mark.parametrize(
    ("places", "level", "text"),
    [
        ([100, 101], "fault", "1 image in several rows of different places"),
        ([100, 100], "note", "1 image in several rows of one place"),
    ],
)
def test_an_image_in_two_rows_is_a_fault_when_the_places_differ(
    tmp_path: Path, places: list[int], level: str, text: str
) -> None:
    tables = clean_tables()
    tables["queries"]["uri"][1] = (
        f"{tmp_path}/d/queries/0.png"  # the same file, written another way
    )
    tables["queries"]["place_id"][:2] = places
    found = inspect_dataset(write(tmp_path / "d", tables))
    finding = only(found, "duplicates", level)
    assert finding.text.startswith(text)
    assert finding.values == {"images": 1, "rows": 2}
    assert len(finding.examples) == 1
    assert found.ok == (level == "note")


def test_an_image_in_several_splits_is_a_note(tmp_path: Path) -> None:
    tables = clean_tables()
    tables["references"]["uri"][8] = "references/1.png"
    note = only(inspect_dataset(write(tmp_path / "d", tables)), "duplicates", "note")
    assert (
        note.text
        == "1 image of references in several splits: a tile may serve training and the test gallery"
    )
    assert note.values == {"view": "references", "images": 1}


def test_references_of_different_places_at_one_position_are_noted_within_a_split(
    tmp_path: Path,
) -> None:
    tables = clean_tables()
    for moved, onto in ((1, 0), (2, 0), (9, 5)):  # 9 is test, 5 is train
        for view in tables.values():
            view["lon"][moved] = view["lon"][onto]
    note = only(inspect_dataset(write(tmp_path / "d", tables)), "duplicates", "note")
    assert note.values == {"references": 3, "positions": 1}
    assert note.examples == ("reference id 0 (place 100) = reference id 1 (place 101) and 1 more",)


def test_leakage_by_distance_and_by_place_is_noted(tmp_path: Path) -> None:
    tables = clean_tables()
    queries = tables["queries"]
    queries["lon"][7] = queries["lon"][2] + 1e-4  # 11 m
    queries["lon"][9] = queries["lon"][3] + 2e-4  # 22 m
    queries["lat"][8] = queries["lon"][8] = None
    queries["place_id"][6] = 100
    uri = write(tmp_path / "d", tables)
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


def test_without_coordinates_nearness_is_said_not_to_be_checked(tmp_path: Path) -> None:
    tables = clean_tables()
    for table in tables.values():
        del table["lat"], table["lon"]
    found = inspect_dataset(write(tmp_path / "d", tables))
    assert only(found, "coordinates", "ok").text == "no row has coordinates"
    assert "not checked" in only(found, "leakage", "note").text


def test_a_query_far_from_its_place_is_noted_and_named(tmp_path: Path) -> None:
    tables = clean_tables()
    tables["queries"]["lat"][4] = 1.0
    note = only(inspect_dataset(write(tmp_path / "d", tables)), "coordinates", "note")
    assert note.text.endswith("1 query over 1,000 m, the farthest query id 4 (place 104)")
    assert note.values["max_m"] == pytest.approx(111_195, rel=1e-4)
    assert note.values["median_m"] == pytest.approx(11.12, rel=1e-3)
    assert note.examples == ("query id 4 (place 104): 111,195 m from reference id 4",)


def test_counts_and_extents_are_told_by_region_and_partly_missing_coordinates_noted(
    tmp_path: Path,
) -> None:
    tables = clean_tables()
    for table in tables.values():
        table["region"] = ["fiji"] * NUM_TRAIN + ["kiribati"] * (NUM_TEST - 1) + [None]
        table["lon"] = [179.98 + 0.01 * i - 360.0 * (i >= 3) for i in range(10)]
    tables["references"]["lat"][9] = tables["references"]["lon"][9] = None
    found = inspect_dataset(write(tmp_path / "d", tables))
    counts = only(found, "counts", "ok")
    assert counts.values["regions"]["kiribati"] == {
        "queries": {"test": 3},
        "references": {"test": 3},
    }
    assert counts.examples[0] == "fiji: queries: train 6; references: train 6"
    note = only(found, "coordinates", "note")
    assert note.values["without"] == {"references": 1, "queries": 0}
    assert "over the antimeridian" in note.examples[0]
    assert note.values["regions"]["fiji"]["west"] == 179.98
    assert note.values["regions"]["kiribati"]["west"] == pytest.approx(-179.96)


def test_places_without_their_other_view_are_noted(tmp_path: Path) -> None:
    tables = clean_tables()
    tables["references"]["split"][8] = "gallery"
    tables["references"]["place_id"][9] = 999
    tables["queries"]["place_id"][1] = 100
    found = inspect_dataset(write(tmp_path / "d", tables))
    unused, unmatched = [f for f in found.findings if (f.topic, f.level) == ("places", "note")]
    assert unused.examples == ("reference id 1 (place 101)",)
    assert unmatched.values == {"split": "test", "unmatched": 1, "queries": 4}
    assert unmatched.examples == ("query id 9 (place 109)",)
    assert only(found, "places", "ok").values == {
        "train_places": 5,
        "mean_queries": 1.2,
        "max_queries": 2,
    }


def test_counts_are_compared_with_the_published_ones_where_the_name_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = only(
        inspect_dataset(write(tmp_path / "a", clean_tables(), "vigor_same_corrected")),
        "counts",
        "note",
    )
    assert note.examples[0] == "queries train 6, published 52,609 (-52,603)"
    assert note.values["references test+gallery"] == {"published": 90_618, "found": 4}
    monkeypatch.setitem(
        PUBLISHED, "small", {"queries train": 6, "references test+gallery": 4}
    )
    found = inspect_dataset(write(tmp_path / "b", clean_tables()))
    assert "as published for small" in [f.text for f in found.findings if f.topic == "counts"]
    assert levels(found) == {"ok"}
    assert sum(PUBLISHED["vigor_cross"].values()) == 105_214


@pytest.fixture
def memory() -> Iterator[Any]:
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def test_images_of_an_object_store_are_listed_and_decoded(memory: Any, tmp_path: Path) -> None:
    tables = clean_tables()
    uri = "memory://inspected"
    write_tables(uri, tables, "remote")
    for i, path in enumerate(path for table in tables.values() for path in table["uri"]):
        draw(tmp_path / f"{i}.png")
        if path != "queries/4.png":
            memory.pipe_file(f"/inspected/{path}", (tmp_path / f"{i}.png").read_bytes())
    found = inspect_dataset(uri, decode=True)
    fault = only(found, "images", "fault")
    assert fault.examples == ("query id 4 (place 104) queries/4.png: missing",)
    assert [f.values["undecodable"] for f in found.findings if "undecodable" in f.values] == [0]


def test_a_data_set_without_queries_can_be_inspected(tmp_path: Path) -> None:
    tables = clean_tables()
    for column, values in tables["queries"].items():
        tables["queries"][column] = pa.array([], pa.array(values).type)
    found = inspect_dataset(write(tmp_path / "d", tables), decode=True)
    assert found.ok
    assert only(found, "places", "note").values == {"unused": 6}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leak_radius_m": -1.0}, r"leak_radius_m=-1\.0 is not within 0\.\."),
        ({"leak_radius_m": float("nan")}, "leak_radius_m=nan"),
        ({"num_threads": 0}, "num_threads=0 is below 1"),
    ],
)
def test_impossible_options_and_a_missing_data_set_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        inspect_dataset(str(tmp_path / "none"), **options)
    with pytest.raises(InputError, match="no data set at"):
        inspect_dataset(str(tmp_path / "none"))


def test_the_table_reads_at_a_hundred_columns(tmp_path: Path) -> None:
    tables = clean_tables()
    tables["queries"]["uri"][1] = "queries/[bold]0[/bold].png"
    tables["queries"]["uri"][2] = "queries/[bold]0[/bold].png"
    found = inspect_dataset(write(tmp_path / "d", tables))
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
