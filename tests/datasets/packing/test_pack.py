from __future__ import annotations

import io
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from typer.testing import CliRunner, Result

from benchmarks.support.s3_server import environment, serving
from s4g_ray.amounts import format_bytes
from s4g_ray.cli.app import app
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import VIEWS
from s4g_ray.data.images import decode, load_raws, resize, try_image
from s4g_ray.data.sphere import metres_between
from s4g_ray.datasets.packing import tar_shards
from s4g_ray.datasets.packing.layout import PackOptions
from s4g_ray.datasets.packing.pack import Packed, pack
from s4g_ray.errors import BadImageError, InputError
from s4g_ray.storage import files
from tests.support.faulty_s3 import proxied
from tests.support.packed_datasets import (
    NUM_IMAGES,
    SMALL,
    WORDS,
    content,
    files_of,
    images_of,
    rows,
    shards_of,
)
from tests.support.sample_images import loader


def test_a_packed_data_set_has_the_rows_and_the_bytes_of_its_source(
    mixed: GeoDataset, packed: Packed
) -> None:
    assert (packed.dataset.name, packed.dataset.views) == ("mixed", WORDS)
    for view in VIEWS:
        source = rows(mixed, view)
        found = rows(packed.dataset, view)
        assert list(found) == list(source)
        for id_, row in found.items():
            places = {name: row[name] for name in ("uri", "offset", "length")}
            assert {**source[id_], **places} == row
            assert row["uri"].startswith(f"shards/{view}-{row['split']}-")
            assert content(packed.dataset, row) == content(mixed, source[id_])
    assert packed.num_images == NUM_IMAGES
    assert packed.num_shards == len(shards_of(packed.dataset)) > 8
    assert packed.num_bytes == sum(
        Path(shard).stat().st_size for shard in shards_of(packed.dataset)
    )


def test_tar_extracts_members_of_a_fixed_form_into_its_folder_only(
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
    """Return the length of the way along the stops, metres."""
    lat, lon = (np.array([row[name] for row in stops]) for name in ("lat", "lon"))
    return float(metres_between(lat[1:], lon[1:], lat[:-1], lon[:-1]).sum())


def test_a_loader_gives_the_same_batches_from_shards_and_a_check_finds_no_fault(
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


def test_a_target_in_the_data_set_or_with_other_files_is_refused_and_not_changed(
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
    """Return the pixels after Pillow's JPEG of quality 95."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=95)
    return decode(file.getvalue()).float()


def test_resized_images_are_those_of_training_except_for_jpeg(
    mixed: GeoDataset, tmp_path: Path
) -> None:
    sizes = {"queries": (20, 48), "references": (9, 11)}
    options = PackOptions(sizes["queries"], sizes["references"], antialias=False)
    dataset = pack(mixed.uri, str(tmp_path / "small"), options).dataset
    distance = {True: 0.0, False: 0.0}  # by antialias: mean difference of a pixel
    for view in VIEWS:
        for id_, row in rows(mixed, view).items():
            data = content(dataset, rows(dataset, view)[id_])
            source = content(mixed, row)
            with Image.open(io.BytesIO(data)) as image:
                assert (image.format, image.size) == ("JPEG", sizes[view][::-1])
            # a JPEG of that size, and upright
            is_copied = view == "queries" and id_ // 7 % 4 != 0
            assert (data == source) == is_copied
            if is_copied:
                continue
            for antialias in (True, False):
                wanted = compressed(resize(decode(source), sizes[view], antialias=antialias))
                difference = float((decode(data).float() - wanted).abs().mean())
                distance[antialias] += difference / 38  # images
    assert distance[False] < 2
    assert distance[True] > 1.2 * distance[False]


def test_bad_images_fail_by_name_or_are_left_out_and_listed_with_their_unmatched_queries(
    damaged: GeoDataset, tmp_path: Path
) -> None:
    target = str(tmp_path / "packed")
    with pytest.raises(
        BadImageError, match=r"references: id 7\d, .*/r10.png: .*; fix the image, or leave it out"
    ):
        pack(damaged.uri, target, SMALL)
    found = pack(damaged.uri, target, replace(SMALL, on_bad_image="skip"))
    reasons: dict[tuple[str, int], str] = {(row.view, row.id): row.reason for row in found.skipped}
    bad = {("references", 70), ("references", 77), ("references", 175), ("queries", 154)}
    unmatched = {("queries", 70), ("queries", 77)}
    assert set(reasons) == bad | unmatched
    assert reasons["queries", 154].endswith("/q22.jpg: missing")
    assert all("no train reference of its place" in reasons[row] for row in unmatched)
    for view in VIEWS:
        assert set(rows(found.dataset, view)) == set(rows(damaged, view)) - {
            id_ for of_view, id_ in reasons if of_view == view
        }
    assert images_of(found.dataset) == [
        {"files": found.num_shards, "missing": 0},
        {"images": 54, "undecodable": 0},
    ]
    with pytest.raises(InputError, match="holds a data set already"):  # which was not asked for
        pack(damaged.uri, target, SMALL)


def test_two_writers_of_a_shard_do_not_write_the_same_temporary_file(tmp_path: Path) -> None:
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
        reads = [key for method, key in proxy.requests if method == "GET" and ".tar" in key]
        uris = {uri for table in tables.values() for uri in table.uris}
        assert len(reads) == len(set(reads)) == len(uris)
        back = pack("s3://data/packed", str(tmp_path / "back"), SMALL).dataset
    assert [Path(shard).read_bytes() for shard in shards_of(back)] == [
        Path(shard).read_bytes() for shard in shards_of(packed.dataset)
    ]


def test_the_command_describes_the_packed_data_set_and_refuses_bad_options(
    mixed: GeoDataset, tmp_path: Path
) -> None:
    def s4g(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["pack", mixed.uri, str(tmp_path / "packed"), *arguments])

    for arguments, message in (
        (["--query-size", "64"], "--query-size 64 is not a height and a width such as 140,768"),
        (["--reference-size", "0,64"], r"--reference-size 0,64 is not within 1..65500"),
        (["--quality", "0"], "--quality 0 is not within 1..100"),
        (["--shard-mb", "0"], "--shard-mb 0 is not above 0"),
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
        f"mixed: {NUM_IMAGES} images in 6 shards, {format_bytes(found['bytes'])}, verified:"
        f" {tmp_path}/packed" in done.stderr
    )


def s4g_raising(done: Result) -> None:
    assert done.exception is not None
    raise done.exception
