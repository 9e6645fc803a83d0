from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from typer.testing import CliRunner, Result

from benchmarks.support.s3_server import environment, serving
from s4g_ray.cli.app import app
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.data.image_table import VIEWS
from s4g_ray.data.images import decode, load_raws, resize, try_image
from s4g_ray.data.sphere import metres_between
from s4g_ray.datasets.inspection.dataset_checks import inspect_dataset
from s4g_ray.datasets.packing import pack as packing
from s4g_ray.datasets.packing import tar_shards
from s4g_ray.datasets.packing.layout import PackOptions
from s4g_ray.datasets.packing.pack import Packed, pack
from s4g_ray.errors import BadImageError, InputError, RunError, StoreError
from s4g_ray.storage import files, manifest
from s4g_ray.storage.manifest import open_published
from tests.support.faulty_s3 import proxied
from tests.support.packed_datasets import (
    NUM_IMAGES,
    SMALL,
    WORDS,
    content,
    files_of,
    rows,
    shards_of,
    write_mixed,
)
from tests.support.sample_images import loader

ROOT = Path(__file__).parents[3]
KILLED = """
import os, signal, sys
from s4g_ray.datasets.packing.pack import pack
from tests.support.packed_datasets import SMALL

def die(done, total):
    if done >= 45:
        os.kill(os.getpid(), signal.SIGKILL)

pack(sys.argv[1], sys.argv[2], SMALL, num_threads=2, on_progress=die)
"""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> GeoDataset:
    return write_mixed(tmp_path_factory.mktemp("data") / "mixed")


@pytest.fixture(scope="module")
def packed(mixed: GeoDataset, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return pack(mixed.uri, str(tmp_path_factory.mktemp("data") / "packed"), SMALL)


def test_a_packed_data_set_has_the_rows_and_the_very_bytes_of_its_source(
    mixed: GeoDataset, packed: Packed
) -> None:
    assert (packed.dataset.name, packed.dataset.views) == ("mixed", WORDS)
    for view in VIEWS:
        source, found = rows(mixed, view), rows(packed.dataset, view)
        assert list(found) == list(source)
        for id_, row in found.items():
            assert {
                **source[id_],
                **{name: row[name] for name in ("uri", "offset", "length")},
            } == row
            assert row["uri"].startswith(f"shards/{view}-{row['split']}-")
            assert content(packed.dataset, row) == content(mixed, source[id_])
    assert packed.num_images == NUM_IMAGES
    assert packed.num_shards == len(shards_of(packed.dataset)) > 8
    assert packed.num_bytes == sum(
        Path(shard).stat().st_size for shard in shards_of(packed.dataset)
    )


def test_tar_extracts_members_of_a_fixed_form_and_into_its_folder_alone(
    packed: Packed, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    for shard in shards_of(packed.dataset):
        subprocess.run(["tar", "-xf", shard, "-C", tmp_path / "out"], check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    found = files_of(tmp_path / "out")
    assert len(found) == NUM_IMAGES
    for name, data in found.items():
        parts = re.fullmatch(r"(references|queries)/(\d{9})\.(jpg|png)", name)
        assert parts, name
        assert data == content(packed.dataset, rows(packed.dataset, parts[1])[int(parts[2])])
        with Image.open(io.BytesIO(data)) as image:
            assert parts[3] == {"JPEG": "jpg", "PNG": "png"}[str(image.format)]


def test_webdataset_reads_the_shards(packed: Packed) -> None:
    samples = list(webdataset.WebDataset(shards_of(packed.dataset), shardshuffle=False))
    assert len(samples) == NUM_IMAGES
    for sample in samples:
        view, _, id_ = sample["__key__"].partition("/")
        (data,) = (value for name, value in sample.items() if not name.startswith("__"))
        assert data == content(packed.dataset, rows(packed.dataset, view)[int(id_)])


def test_neighbors_on_the_ground_are_neighbors_on_disk_and_rows_without_coordinates_come_last(
    packed: Packed,
) -> None:
    train = [row for row in rows(packed.dataset, "queries").values() if row["split"] == "train"]
    stored = sorted(train, key=lambda row: (row["uri"], row["offset"]))
    assert [row["id"] for row in stored[-2:]] == [7 * 3, 7 * 5]
    assert path_m(stored[:-2]) < 0.5 * path_m([row for row in train if row["lat"] is not None])
    sizes = [
        Path(shard).stat().st_size
        for shard in shards_of(packed.dataset)
        if "queries-train" in shard
    ]
    assert 10_000 < min(sizes) <= max(sizes) < 30_000


def path_m(stops: list[dict[str, Any]]) -> float:
    """The length of the way from each to the next, metres."""
    lat, lon = (np.array([row[name] for row in stops]) for name in ("lat", "lon"))
    return float(metres_between(lat[1:], lon[1:], lat[:-1], lon[:-1]).sum())


def test_a_loader_gives_the_same_batches_from_shards_and_a_check_finds_them_whole(
    mixed: GeoDataset, packed: Packed
) -> None:
    ids = np.arange(20).reshape(4, 5) * 7
    with loader(mixed) as one, loader(packed.dataset) as other:
        pairs = zip(one.load(ids, ids, epoch=2), other.load(ids, ids, epoch=2), strict=True)
        for wanted, found in pairs:
            assert wanted.valid.all()
            assert torch.equal(wanted.queries, found.queries)
            assert torch.equal(wanted.references, found.references)
    assert images_of(packed.dataset) == [
        {"files": packed.num_shards, "missing": 0},
        {"images": NUM_IMAGES, "undecodable": 0},
    ]


def images_of(dataset: GeoDataset) -> list[dict[str, int]]:
    """What an inspection finds of files and of images."""
    findings = inspect_dataset(dataset.uri, decode=True).findings
    return [finding.values for finding in findings if finding.topic == "images"][:2]


def test_a_killed_pack_goes_on_and_ends_with_the_bytes_of_one_thread_that_was_not(
    mixed: GeoDataset, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLED, mixed.uri, str(tmp_path / "killed")]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(InputError, match="no data set at"):
        open_dataset(str(tmp_path / "killed"))
    with pytest.raises(
        InputError,
        match=r"part of data set mixed \(.*\) with quality=95, but mixed \(.*\) with quality=80 is",
    ):
        pack(mixed.uri, str(tmp_path / "killed"), PackOptions(shard_mb=0.02, quality=80))
    seen: list[tuple[int, int]] = []
    resumed = pack(
        mixed.uri, str(tmp_path / "killed"), SMALL, on_progress=lambda *now: seen.append(now)
    )
    assert 2 <= resumed.reused_shards < resumed.num_shards
    assert seen[-1] == (NUM_IMAGES, NUM_IMAGES)
    whole = pack(mixed.uri, str(tmp_path / "whole"), SMALL, num_threads=1)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    assert resumed.dataset.fingerprint == whole.dataset.fingerprint != mixed.fingerprint


def test_a_finished_pack_is_returned_as_it_is_and_anything_else_there_is_refused(
    mixed: GeoDataset, packed: Packed, tmp_path: Path
) -> None:
    before = files_of(packed.dataset.uri)
    again = pack(mixed.uri, packed.dataset.uri, SMALL)
    assert (again.reused_shards, again.num_images) == (packed.num_shards, packed.num_images)
    assert files_of(packed.dataset.uri) == before
    for options in (PackOptions(shard_mb=0.02, reference_size=(8, 8)), PackOptions()):
        with pytest.raises(
            InputError, match="holds a data set already; remove it or choose another folder"
        ):
            pack(mixed.uri, packed.dataset.uri, options)
    shutil.copytree(packed.dataset.uri, tmp_path / "copy")
    Path(shards_of(open_dataset(str(tmp_path / "copy")))[0]).unlink()
    with pytest.raises(RunError, match=r"queries-test-00000.tar is in the manifest but missing"):
        pack(mixed.uri, str(tmp_path / "copy"), SMALL)


def test_a_target_in_the_data_set_and_one_that_holds_something_else_are_refused_and_left_alone(
    mixed: GeoDataset, tmp_path: Path
) -> None:
    for target in (mixed.uri, f"{mixed.uri}/packed"):
        with pytest.raises(InputError, match="is inside the data set to be packed"):
            pack(mixed.uri, target)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty, and was not begun by s4g pack"):
        pack(mixed.uri, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def compressed(pixels: torch.Tensor) -> torch.Tensor:
    """What Pillow's JPEG of quality 95 leaves."""
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file := io.BytesIO(), "JPEG", quality=95)
    return decode(file.getvalue()).float()


def test_resized_images_are_what_training_would_see_but_for_jpeg(
    mixed: GeoDataset, tmp_path: Path
) -> None:
    sizes = {"queries": (20, 48), "references": (9, 11)}
    options = PackOptions(sizes["queries"], sizes["references"], antialias=False)
    dataset = pack(mixed.uri, str(tmp_path / "small"), options).dataset
    far = {True: 0.0, False: 0.0}
    for view in VIEWS:
        for id_, row in rows(mixed, view).items():
            data, source = content(dataset, rows(dataset, view)[id_]), content(mixed, row)
            with Image.open(io.BytesIO(data)) as image:
                assert (image.format, image.size) == ("JPEG", sizes[view][::-1])
            stays = view == "queries" and id_ // 7 % 4 != 0  # a JPEG of that size, and upright
            assert (data == source) == stays
            for antialias in () if stays else (True, False):
                wanted = compressed(resize(decode(source), sizes[view], antialias=antialias))
                far[antialias] += float((decode(data).float() - wanted).abs().mean()) / 38  # images
    assert far[False] < 2
    assert far[True] > 1.2 * far[False]


@pytest.fixture
def damaged(tmp_path: Path) -> GeoDataset:
    """With a missing query of the test split, and a reference that two train rows share cut short."""
    dataset = write_mixed(tmp_path / "damaged")
    (tmp_path / "damaged/pictures/q22.jpg").unlink()
    cut = tmp_path / "damaged/pictures/r10.png"
    cut.write_bytes(cut.read_bytes()[:-40])
    return dataset


def test_bad_images_fail_by_name_or_are_left_out_and_told_with_the_queries_that_they_leave_alone(
    damaged: GeoDataset, tmp_path: Path
) -> None:
    target = str(tmp_path / "packed")
    with pytest.raises(
        BadImageError, match=r"references: id 7\d, .*/r10.png: .*; fix the image, or leave it out"
    ):
        pack(damaged.uri, target, SMALL)
    found = pack(damaged.uri, target, replace(SMALL, on_bad_image="skip"))
    told: dict[tuple[str, int], str] = {(row.view, row.id): row.reason for row in found.skipped}
    lonely = {("queries", 70), ("queries", 77)}
    assert (
        set(told)
        == {("references", 70), ("references", 77), ("references", 175), ("queries", 154)} | lonely
    )
    assert told["queries", 154].endswith("/q22.jpg: missing")
    assert all("no train reference of its place" in told[row] for row in lonely)
    for view in VIEWS:
        assert set(rows(found.dataset, view)) == set(rows(damaged, view)) - {
            id_ for v, id_ in told if v == view
        }
    assert images_of(found.dataset) == [
        {"files": found.num_shards, "missing": 0},
        {"images": 54, "undecodable": 0},
    ]
    with pytest.raises(InputError, match="holds a data set already"):  # which was not asked for
        pack(damaged.uri, target, SMALL)


def test_a_shard_that_the_store_garbles_is_noticed_and_written_again(
    mixed: GeoDataset, packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = [0]

    @contextmanager
    def garbling(uri: str) -> Iterator[IO[bytes]]:
        with tar_shards.new_object(uri) as file:
            yield file
            if uri.endswith("references-val-00000.tar"):
                file.seek(at[0])
                file.write(b"x")

    monkeypatch.setattr(packing, "new_object", garbling)
    for at[0], message in (
        (700, r"tar: references/\d{9}\.\w+ at byte 512 is not what"),
        (3, r"tar is not what was"),
    ):
        with pytest.raises(RunError, match=message):
            pack(mixed.uri, str(tmp_path / "packed"), SMALL)
    monkeypatch.undo()
    found = pack(mixed.uri, str(tmp_path / "packed"), SMALL)
    assert found.reused_shards > 0
    assert images_of(found.dataset) == images_of(packed.dataset)


def test_mended_images_are_packed_by_the_next_call_and_nothing_of_an_earlier_attempt_stays(
    mixed: GeoDataset, damaged: GeoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, skip = tmp_path / "packed", replace(SMALL, on_bad_image="skip")
    monkeypatch.setattr(packing, "publish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack(damaged.uri, str(target), skip)
    monkeypatch.undo()
    shutil.copytree(
        Path(mixed.uri).parent / "pictures",
        Path(damaged.uri).parent / "pictures",
        dirs_exist_ok=True,
    )
    for name in ("queries-train-00099.tar", ".queries-train-00000.tar.0a1b2c3d.tmp", "mine.tar"):
        (target / "shards" / name).write_bytes(b"another's")
    found = pack(damaged.uri, str(target), skip)
    assert found.reused_shards > 0
    assert (found.skipped, found.num_images) == ((), NUM_IMAGES)
    published = {part.name for part in open_published(f"{target}/shards", packing.KIND).parts}
    assert set(files_of(target / "shards")) == {*published, files.MANIFEST, "mine.tar"}


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("name", ["read_json", "open_part"])
def test_a_store_that_does_not_answer_is_an_error_and_not_taken_for_an_empty_one(
    finished: bool,
    name: str,
    mixed: GeoDataset,
    packed: Packed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "packed"
    if finished:
        shutil.copytree(packed.dataset.uri, target)
    else:
        monkeypatch.setattr(packing, "publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pack(mixed.uri, str(target), SMALL)
        monkeypatch.undo()
    before = files_of(target)
    # every module that looks the function up
    modules = (files, manifest) if name == "read_json" else (packing,)
    function = getattr(modules[0], name)

    def fail_in_target(uri: str, *more: Any) -> Any:
        if uri.startswith(str(target)) and not uri.endswith("dataset.json"):
            raise StoreError("did not answer")
        return function(uri, *more)

    for module in modules:
        monkeypatch.setattr(module, name, fail_in_target)
    with pytest.raises(StoreError, match="did not answer"):
        pack(
            mixed.uri,
            str(target),
            replace(SMALL, quality=80) if name == "read_json" else SMALL,
            num_threads=1,
        )
    assert files_of(target) == before


@pytest.mark.parametrize("said", ["[]", "{}", '{"key": "other"}', '{"key'])
def test_a_claim_that_was_altered_is_made_anew(
    said: str, mixed: GeoDataset, tmp_path: Path
) -> None:
    (tmp_path / "_work").mkdir()
    (tmp_path / "_work/pack.json").write_text(said)
    assert pack(mixed.uri, str(tmp_path), PackOptions()).num_images == NUM_IMAGES


def test_two_that_write_a_shard_at_once_do_not_write_one_file(tmp_path: Path) -> None:
    uri = str(tmp_path / "shard.tar")
    with tar_shards.new_object(uri) as one:
        one.write(b"longer")
        with tar_shards.new_object(uri) as other:
            other.write(b"short")
        assert Path(uri).read_bytes() == b"short"
    assert files_of(tmp_path) == {"shard.tar": b"longer"}


@pytest.mark.s3
def test_a_data_set_is_packed_into_an_object_store_and_out_of_it(
    mixed: GeoDataset, packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving("data") as endpoint, proxied(endpoint) as proxy:
        for name, value in environment(proxy.endpoint).items():
            monkeypatch.setenv(name, value)
        there = pack(mixed.uri, "s3://data/packed", SMALL).dataset
        assert there.fingerprint == packed.dataset.fingerprint
        for shard in shards_of(packed.dataset):
            name = Path(shard).name
            assert files.read_bytes(f"s3://data/packed/shards/{name}") == Path(shard).read_bytes()
        assert not files.list_names("s3://data/packed/_work")
        proxy.reset()
        tables = {view: there.table(view, ["train"]) for view in VIEWS}
        found = {view: list(load_raws(table, range(len(table)))) for view, table in tables.items()}
        for view in VIEWS:
            local = packed.dataset.table(view, ["train"])
            wanted = [try_image(image) for image in load_raws(local, range(len(local)))]
            assert all(
                torch.equal(try_image(a), b) for a, b in zip(found[view], wanted, strict=True)
            )
        reads = [key for what, key in proxy.requests if what == "GET" and ".tar" in key]
        assert (
            len(reads)
            == len(set(reads))
            == len({uri for table in tables.values() for uri in table.uris})
        )
        back = pack("s3://data/packed", str(tmp_path / "back"), SMALL).dataset
    assert [Path(shard).read_bytes() for shard in shards_of(back)] == [
        Path(shard).read_bytes() for shard in shards_of(packed.dataset)
    ]


def test_the_command_says_what_it_packed_and_refuses_what_it_cannot_read(
    mixed: GeoDataset, tmp_path: Path
) -> None:
    def s4g(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["pack", mixed.uri, str(tmp_path / "packed"), *arguments])

    for arguments, message in (
        (["--query-size", "64"], "--query-size 64 is not a height and a width such as 140,768"),
        (["--reference-size", "0,64"], r"reference_size=\(0, 64\) is not within 1..65500"),
        (["--quality", "0"], "quality=0 is not within 1..100"),
        (["--shard-mb", "0"], "shard_mb=0.0 is not above 0"),
        (["--workers", "0"], "--workers 0 is below 1"),
    ):
        with pytest.raises(InputError, match=message):
            s4g_raising(s4g(*arguments))
    done = s4g("--query-size", "10,24", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["images"], found["shards"], found["reused_shards"], found["skipped"]) == (
        NUM_IMAGES,
        6,
        0,
        [],
    )
    assert (
        f"mixed: {NUM_IMAGES} images in 6 shards, 0.1 MB, verified: {tmp_path}/packed"
        in done.stderr
    )


def s4g_raising(done: Result) -> None:
    assert done.exception is not None
    raise done.exception
