from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.datasets.imagery.cutting.region import CutOptions, GridPart, TileSource, cut_region
from s4g_ray.datasets.imagery.cutting.summary import read_summary
from s4g_ray.errors import InputError, RunError
from s4g_ray.progress import ignore
from s4g_ray.storage import files
from tests.support.made_up_tiles import (
    SMALL,
    KillingReader,
    MadeUpReader,
    contents,
    make_part,
    make_source,
)

ROOT = Path(__file__).parents[4]
KILLED = """
import os, signal, sys
from s4g_ray.datasets.imagery.cutting.region import cut_region
from tests.support.made_up_tiles import SMALL, make_part, make_source

def die(done, total):
    if done >= total / 2:
        os.kill(os.getpid(), signal.SIGKILL)

num_tasks = int(sys.argv[2])
cut_region(
    sys.argv[1], make_source(), [make_part()], SMALL, name="r", num_tasks=num_tasks, on_progress=die
)
"""


def cut(
    target: Path | str,
    source: TileSource | None = None,
    parts: list[GridPart] | None = None,
    options: CutOptions = SMALL,
    num_tasks: int | None = 0,
    on_progress: Any = ignore,
) -> GeoDataset:
    return cut_region(
        str(target),
        source or make_source(),
        parts or [make_part()],
        options,
        name="r",
        num_tasks=num_tasks,
        on_progress=on_progress,
    )


def test_a_region_holds_each_kept_cell_once_with_the_bytes_of_its_tile(tmp_path: Path) -> None:
    part = make_part()
    seen: list[tuple[int, int]] = []
    dataset = cut(tmp_path / "r", on_progress=lambda *now: seen.append(now))
    ids = part.cells.ids
    kept = ids[(ids % 7 != 0) & (ids % 11 != 0)]
    rows = open_dataset(dataset.uri).references.to_table().sort_by("id").to_pylist()
    assert [row["id"] for row in rows] == sorted(kept.tolist())
    assert seen[-1] == (len(ids), len(ids))
    assert len(seen) > 3
    assert dataset.queries.count_rows() == 0
    place = {int(i): (a, b) for i, a, b in zip(ids, part.cells.lat, part.cells.lon, strict=True)}
    reader = MadeUpReader()
    for row in rows:
        assert row["place_id"] == row["id"]
        assert row["split"] == "gallery"
        assert row["size_m"] == 60
        assert (row["lat"], row["lon"]) == place[row["id"]]
        data = files.read_bytes(files.join(dataset.uri, row["uri"]), row["offset"], row["length"])
        found = np.asarray(Image.open(io.BytesIO(data))).astype(int)
        cell = part.cells.take(ids == row["id"])
        [tile] = reader(cell)
        assert np.abs(found - tile.pixels).max() < 20  # type: ignore[union-attr]
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == [
        *("coverage.geojson", "coverage.png", "dataset.json", "queries", "references", "shards")
    ]


def test_the_summary_counts_every_cell_and_why_it_was_dropped(tmp_path: Path) -> None:
    dataset = cut(tmp_path / "r", parts=[make_part(), make_part(120, 0.5)])
    summary = read_summary(dataset.uri)
    ids = np.concatenate([make_part().cells.ids, make_part(120, 0.5).cells.ids])
    outside = int((ids % 7 == 0).sum())
    empty = int(((ids % 11 == 0) & (ids % 7 != 0)).sum())
    assert summary.dropped == {"more than 0.05 without data": empty, "outside the imagery": outside}
    assert summary.cells == len(ids) == summary.tiles + outside + empty
    assert summary.tiles == dataset.references.count_rows() == sum(summary.tiles_by_size.values())
    shards = list((tmp_path / "r/shards").glob("*.tar"))
    assert summary.shards == len(shards)
    assert summary.bytes == sum(path.stat().st_size for path in shards)
    collection = json.loads((tmp_path / "r/coverage.geojson").read_text())
    sizes = [feature["properties"]["size_m"] for feature in collection["features"]]
    assert sizes == [60, 120]
    # centres lie within 1.43 x 1.11 km, and the larger tiles end up to 60 m beyond
    assert 0.9 * 1.43 * 1.11 < summary.ground_km2 < 1.55 * 1.23
    assert Image.open(tmp_path / "r/coverage.png").size[0] > 400


def test_shards_are_tar_files_with_a_key_for_each_image(tmp_path: Path) -> None:
    dataset = cut(tmp_path / "r")
    names: list[str] = []
    for path in sorted((tmp_path / "r/shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            names += tar.getnames()
    ids = dataset.references.to_table(columns=["id"])["id"].to_pylist()
    assert Counter(names) == Counter(f"references/{id_:09d}.jpg" for id_ in ids)
    urls = [f"file:{path}" for path in sorted((tmp_path / "r/shards").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert {sample["__key__"] for sample in samples} == {f"references/{id_:09d}" for id_ in ids}
    assert all(sample["jpg"][:2] == b"\xff\xd8" for sample in samples)


def test_a_killed_cut_resumes_and_writes_the_bytes_of_an_uninterrupted_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), "0"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(InputError, match="no data set at"):
        open_dataset(str(tmp_path / "killed"))
    with pytest.raises(
        InputError, match=r"was begun with \{'quality': 90\}, not \{'quality': 80\}"
    ):
        cut(tmp_path / "killed", options=CutOptions(pixels=16, quality=80))
    # a shard that was cut short meanwhile is cut again; one without a commit is, too
    shards = sorted((tmp_path / "killed/shards").glob("*.tar"))
    commits = list((tmp_path / "killed/_work").glob("block-*.json"))
    shards[0].write_bytes(shards[0].read_bytes()[:-512])
    resumed = cut(tmp_path / "killed")
    whole = cut(tmp_path / "whole")
    assert resumed.fingerprint == whole.fingerprint
    manifest = "shards/_MANIFEST.json"
    found, wanted = contents(tmp_path / "killed"), contents(tmp_path / "whole")
    assert read_summary(resumed.uri).reused_shards == len(commits) - 1 > 0
    assert found.pop(manifest) != wanted.pop(manifest)
    assert found == wanted


@pytest.mark.cluster
def test_shards_have_the_same_bytes_for_any_number_of_tasks(
    tmp_path: Path, ray_cluster: None
) -> None:
    alone = cut(tmp_path / "0")
    for num_tasks in (1, 3):
        dataset = cut(tmp_path / str(num_tasks), num_tasks=num_tasks)
        assert dataset.fingerprint == alone.fingerprint
        assert contents(tmp_path / str(num_tasks)) == contents(tmp_path / "0")
    with pytest.raises(RunError, match="the reader gave no result for cells"):
        cut(tmp_path / "lost", source=lossy_source(), num_tasks=2)


@pytest.mark.cluster
def test_a_cut_whose_driver_and_whose_task_were_killed_writes_the_bytes_of_an_uninterrupted_one(
    tmp_path: Path, ray_cluster: None
) -> None:
    import ray

    killed = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(killed), "2"]
    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_ADDRESS": address}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    (killed / "shards/.references-gallery-00000.tar.0123.tmp").write_bytes(b"cut off")
    source = dataclasses.replace(make_source(), read=KillingReader(str(tmp_path / "died")))
    resumed = cut(killed, source=source, num_tasks=2)
    assert (tmp_path / "died").exists()
    summary = read_summary(resumed.uri)
    assert 0 < summary.reused_shards < summary.shards
    cut(tmp_path / "whole")
    manifest = "shards/_MANIFEST.json"  # tells how many shards were reused
    found, wanted = contents(killed), contents(tmp_path / "whole")
    assert found.pop(manifest) != wanted.pop(manifest)
    assert found == wanted


def lossy_source() -> TileSource:
    source = make_source()
    return TileSource(skip_first, "", "full", 1.0, source.footprint)


def skip_first(cells: Any) -> Any:
    return MadeUpReader()(cells.take(slice(1, None)))


def test_a_target_that_holds_something_else_is_left_as_it_is(tmp_path: Path) -> None:
    cut(tmp_path / "r")
    before = contents(tmp_path / "r")
    with pytest.raises(InputError, match="holds a data set already"):
        cut(tmp_path / "r")
    assert contents(tmp_path / "r") == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not begun by s4g convert imagery"):
        cut(tmp_path / "full")
    assert contents(tmp_path / "full") == {"notes.txt": b"mine"}


def test_no_tile_left_says_why_and_leaves_the_target_free(tmp_path: Path) -> None:
    count = len(make_part().cells)
    message = f"no tile is left of {count} cells: {count} outside the imagery; give another area"
    with pytest.raises(InputError, match=message):
        cut(tmp_path / "r", source=make_source(drops_all=True))
    assert cut(tmp_path / "r").references.count_rows() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixels": 4}, "--pixels 4 is not within 8..8192"),
        ({"quality": 0}, "--quality 0 is not within 1..100"),
        ({"max_nodata": 1.0}, "--max-nodata 1 must be 0 or more, and below 1"),
        ({"split": "all"}, "--split 'all' is none of train, val, test, gallery"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CutOptions(**options)
