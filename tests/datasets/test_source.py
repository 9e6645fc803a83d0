from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from s4g_ray.amounts import join_first
from s4g_ray.cli.convert import convert_app
from s4g_ray.cli.sources.published import COMMANDS
from s4g_ray.cli.sources.run_converter import summarize
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.data.image_table import VIEWS
from s4g_ray.data.images import decode
from s4g_ray.datasets import cvact, cvusa, folder, university1652, vigor
from s4g_ray.datasets.source import SourceFolder
from s4g_ray.datasets.source_rows import Row
from s4g_ray.errors import InputError
from s4g_ray.storage import files
from tests.support import source_trees

Make = Callable[[Path], Path]
IMAGES = (".jpg", ".jpeg", ".png")


def plain_tree(root: Path) -> Path:
    """Write a folder for `s4g convert folder`: 4 tiles, 4 photos and their CSV files."""
    for number in range(4):
        source_trees.save_view(root / f"tiles/{number}.png", number, 0, (16, 16))
        source_trees.save_view(root / f"photos/{number}.jpg", number, 1, (16, 16))
    for name, view in (("references", "tiles/{}.png"), ("queries", "photos/{}.jpg")):
        source_trees.write_lines(
            root / f"{name}.csv",
            [
                "path,lat,lon",
                *(f"{view.format(number)},{10 + number},{20 + number}" for number in range(4)),
            ],
        )
    return root


CONVERTERS: dict[str, tuple[Any, Make]] = {
    "cvusa": (cvusa, source_trees.cvusa_tree),
    "cvact": (cvact, source_trees.cvact_tree),
    "vigor": (vigor, source_trees.vigor_tree),
    "university1652": (university1652, source_trees.university_tree),
    "folder": (folder, plain_tree),
}
every_converter = pytest.mark.parametrize(
    ("converter", "make"), CONVERTERS.values(), ids=CONVERTERS
)


def read_rows(dataset: GeoDataset) -> list[Any]:
    """Return all rows of both views, sorted by id."""
    return [getattr(dataset, view).to_table().sort_by("id").to_pylist() for view in VIEWS]


@pytest.fixture
def memory() -> Iterator[Any]:
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


@every_converter
def test_converting_lists_each_folder_once_and_neither_opens_nor_stats_an_image(
    converter: Any, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(tmp_path / "source")
    wanted = read_rows(converter.convert(str(source), str(tmp_path / "wanted")))
    for path in [path for path in source.rglob("*") if path.suffix in IMAGES]:
        path.unlink()
        path.symlink_to(tmp_path / "nowhere")  # can be listed, but not opened; stat fails too
    listed: list[str] = []
    asked: list[str] = []

    def record_calls(function: Any, uris: list[str]) -> Any:
        def call(uri: str, *more: Any) -> Any:
            uris.append(uri)
            return function(uri, *more)

        return call

    monkeypatch.setattr(files, "list_names", record_calls(files.list_names, listed))
    monkeypatch.setattr(files, "read_bytes", record_calls(files.read_bytes, asked))
    monkeypatch.setattr(files, "exists", record_calls(files.exists, asked))
    found = read_rows(converter.convert(str(source), str(tmp_path / "target")))
    assert found == wanted
    of_source = [uri for uri in listed if uri.startswith(str(source))]
    assert len(of_source) == len(set(of_source)) > 0
    assert not [uri for uri in asked if uri.endswith(IMAGES)]


@every_converter
def test_a_source_in_an_object_store_gives_the_same_rows(
    converter: Any, make: Make, tmp_path: Path, memory: Any
) -> None:
    source = make(tmp_path / "source")
    wanted = read_rows(converter.convert(str(source), str(tmp_path / "local"), strict=True))
    for path in source.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/bucket/source/{path.relative_to(source)}", path.read_bytes())
    dataset = converter.convert("memory://bucket/source", "memory://made/set", strict=True)
    assert read_rows(dataset) == wanted
    assert all(not row["uri"].startswith("/") for rows in wanted for row in rows)
    opened = open_dataset("memory://made/set")
    assert opened.images_root == dataset.images_root == "memory://bucket/source"
    assert opened.fingerprint == open_dataset(str(tmp_path / "local")).fingerprint


@every_converter
def test_all_paths_are_images_and_both_views_of_a_place_are_alike(
    converter: Any, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    dataset = converter.convert("source", "target")
    assert dataset.uri == str(tmp_path / "target")
    assert set(dataset.views) == set(VIEWS)
    references = dict(source_trees.rows(dataset, "references", "place_id", "uri"))
    queries = source_trees.rows(dataset, "queries", "place_id", "uri")
    assert {uri[: len(str(tmp_path)) + 8] for _, uri in queries} == {f"{tmp_path}/source/"}

    def mean_color(uri: str) -> Any:
        image = decode(Path(uri).read_bytes()).float().numpy()
        return image.mean(axis=(1, 2))

    differences = [
        np.abs(mean_color(uri) - mean_color(references[place])).max() for place, uri in queries
    ]
    assert max(differences) < 8


@every_converter
def test_a_target_that_holds_a_data_set_is_refused_before_the_source_is_read(
    converter: Any, make: Make, tmp_path: Path
) -> None:
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(InputError, match="holds a data set already"):
        converter.convert(str(tmp_path / "no such source"), str(tmp_path))


def s4g_convert(*arguments: str) -> tuple[Any, list[str]]:
    """Run `s4g convert`; return the JSON on standard output, and the lines on standard error."""
    done = CliRunner().invoke(convert_app, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout), done.stderr.splitlines()


@pytest.mark.parametrize(
    ("name", "summary"),
    [
        ("cvusa", "cvusa: 4 train and 2 test queries, 6 references in {}"),
        ("cvact", "cvact: 4 train, 2 val and 3 test queries, 9 references in {}"),
        ("vigor", "vigor_same: 12 train and 12 test queries, 36 references in {}"),
        (
            "university1652",
            "university1652_drone_to_satellite: 12 train and 6 test queries,"
            " 7 references (1 of them gallery only) in {}",
        ),
        ("folder", "source: 3 train and 1 test queries, 4 references in {}"),
    ],
)
def test_each_command_describes_the_data_set(name: str, summary: str, tmp_path: Path) -> None:
    source = CONVERTERS[name][1](tmp_path / "source")
    target = str(tmp_path / "target")
    result, lines = s4g_convert(name, str(source), target)
    dataset = open_dataset(target)
    header = files.read_json(f"{target}/dataset.json")
    notes = []
    if name == "folder":
        distances = "0 m (median), 95 % within 0 m, the farthest 0 m"
        notes = [f"queries from their tiles: {distances}"]
    assert lines == [*notes, summary.format(target)]
    assert result == {
        "uri": target,
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "counts": header["counts"],
        "notes": notes,
    }


@pytest.mark.parametrize(
    ("name", "arguments", "made"),
    [
        ("cvusa", ["--no-coordinates"], "cvusa"),
        ("cvact", ["--no-test"], "cvact"),
        ("vigor", ["--area", "cross", "--labels", "corrected"], "vigor_cross_corrected"),
        (
            "university1652",
            ["--query-view", "street,google", "--reference-view", "drone"],
            "university1652_street+google_to_drone",
        ),
        (
            "folder",
            ["--pair", "key", "--key-column", "lat", "--name", "mine", "--test-fraction", "0"],
            "mine",
        ),
    ],
)
def test_the_options_of_each_command_reach_the_converter(
    name: str, arguments: list[str], made: str, tmp_path: Path
) -> None:
    source = CONVERTERS[name][1](tmp_path / "source")
    target = str(tmp_path / "target")
    # --no-coordinates and --no-test are for sources without these
    for removed in ("split_locations", "ANU_data_test"):
        shutil.rmtree(source / removed, ignore_errors=True)
    result, _ = s4g_convert(name, str(source), target, *arguments, "--strict")
    assert result["name"] == made


def test_commands_show_notes_and_refuse_missing_images_when_strict(tmp_path: Path) -> None:
    source = source_trees.cvusa_tree(tmp_path / "source")
    (source / "streetview/panos/0000003.jpg").unlink()
    result, lines = s4g_convert("cvusa", str(source), str(tmp_path / "target"))
    notes = [
        "missing images: 1, left out with their rows: streetview/panos/0000003.jpg",
        "pairs left out for a missing image: 1",
    ]
    assert result["notes"] == notes
    assert lines[:2] == notes
    with pytest.raises(InputError, match="missing images: 1"):
        s4g_convert("cvusa", str(source), str(tmp_path / "strict"), "--strict")


def test_every_option_of_every_command_has_a_help_text() -> None:
    group: Any = get_command(convert_app)
    expected = {*CONVERTERS, *COMMANDS, "earth", "imagery", "landsat", "relocate", "stretch"}
    assert set(group.commands) == expected
    for command in group.commands.values():
        assert command.help
        assert [option.name for option in command.params if not option.help] == []


def test_the_first_complete_layout_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "list.txt").touch()
    source = SourceFolder(str(tmp_path))
    assert (
        source.choose_layout({"one": ["a/c"], "two": ["a/b", "list.txt"], "three": ["a"]}) == "two"
    )
    assert not source.has("list.txt/more")


def test_a_wrong_layout_is_one_message_with_needed_and_found_names_and_the_nearest_layout(
    tmp_path: Path,
) -> None:
    for name in ("train/street", "train/drone", *(f"n{number:02d}" for number in range(12))):
        (tmp_path / name).mkdir(parents=True)
    variants = {"far": ["x", "y", "z"], "near": ["n00", "train/satellite", "test/q"]}
    with pytest.raises(InputError) as error:
        SourceFolder(str(tmp_path)).choose_layout(variants, "remedy")
    assert str(error.value).splitlines() == [
        f"{tmp_path} has no known layout; it holds n00, n01, n02, n03, n04, n05, n06, n07, n08,"
        " n09 and 3 more",
        "layout 'far' needs x, y, z",
        "layout 'near' needs n00, train/satellite, test/q",
        "nearest: 'near', which lacks train/satellite (train holds drone, street); test/q",
        "remedy",
    ]
    source_trees.cvact_tree(tmp_path / "other")
    with pytest.raises(InputError, match="this looks like cvact: s4g convert cvact"):
        cvusa.convert(str(tmp_path / "other"), str(tmp_path / "x"))
    with pytest.raises(InputError, match="none is empty or missing"):
        SourceFolder(str(tmp_path / "none")).choose_layout(variants)


def test_the_first_ten_names_are_listed_and_the_others_counted() -> None:
    assert join_first(["a", "b"]) == "a, b"
    assert (
        join_first([str(n) for n in range(1012)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 1,002 more"
    )


def test_rows_left_out_are_reported_in_order_and_strict_refuses_missing_images(
    tmp_path: Path,
) -> None:
    (tmp_path / "here.jpg").touch()
    notes: list[str] = []
    source = SourceFolder(str(tmp_path), notes.append)
    assert source.has_image("here.jpg")
    assert not source.has_image("x/gone.jpg")
    assert not source.has_image("x/gone.jpg")
    assert not source.has_pair("here.jpg", "gone.jpg")
    assert not source.has_pair("no.jpg", "gone.jpg")
    source.add_note("something else")
    references = [
        Row(id=0, place_id=5, uri="r", split="train"),
        Row(id=1, place_id=6, uri="r", split="gallery"),
    ]
    queries = [
        Row(id=number, place_id=place, uri="q", split=split)
        for number, (place, split) in enumerate(
            [(5, "train"), (6, "train"), (6, "test"), (5, "test"), (7, "val")]
        )
    ]
    views = {"references": "tile", "queries": "photo"}
    with pytest.raises(
        InputError, match=r"missing images: 3: x/gone\.jpg, gone\.jpg, no\.jpg; add them"
    ):
        source.write(str(tmp_path / "d"), references, queries, name="n", views=views, strict=True)
    assert notes == []
    dataset = source.write(
        str(tmp_path / "d"), references, queries, name="n", views=views, strict=False
    )
    assert notes == [
        "missing images: 3, left out with their rows: x/gone.jpg, gone.jpg, no.jpg",
        "something else",
        "pairs left out for a missing image: 2",
        "train queries left out because their place has no train reference: 1",
        "val queries that evaluation leaves out because their place has no reference: 1",
        "test queries that evaluation leaves out because their place has no reference: 1",
    ]
    assert source_trees.rows(dataset, "queries", "id") == [(0,), (2,), (3,), (4,)]


def test_empty_views_and_unreadable_texts_are_refused(tmp_path: Path) -> None:
    source = SourceFolder(str(tmp_path))
    row = [Row(id=0, place_id=0, uri="r", split="test")]
    with pytest.raises(InputError, match="no queries are left to convert"):
        source.write(str(tmp_path / "d"), row, [], name="n", views={}, strict=False)
    with pytest.raises(InputError, match="no references are left to convert"):
        source.write(str(tmp_path / "d"), [], row, name="n", views={}, strict=False)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo")
    with pytest.raises(InputError, match=r"latin\.txt is not UTF-8"):
        source.read_text("latin.txt")
    assert source.read_lines("mark.txt") == [
        (f"{tmp_path}/mark.txt, line 1", "one"),
        (f"{tmp_path}/mark.txt, line 3", "two"),
    ]
    with pytest.raises(InputError, match=r"none\.txt is missing; .* holds latin\.txt, mark\.txt"):
        SourceFolder(str(tmp_path)).read_text("none.txt")


def test_the_summary_names_queries_by_split_and_all_references() -> None:
    counts = {
        "queries": {"test": 8884, "train": 35532},
        "references": {"train": 35532, "test": 8884},
    }
    assert (
        summarize("cvusa", "/t", counts)
        == "cvusa: 35,532 train and 8,884 test queries, 44,416 references in /t"
    )
    counts = {
        "queries": {"train": 1, "val": 2, "test": 3},
        "references": {"train": 4, "gallery": 1000},
    }
    assert (
        summarize("x", "s3://t", counts)
        == "x: 1 train, 2 val and 3 test queries, 1,004 references (1,000 of them gallery only) in s3://t"
    )
