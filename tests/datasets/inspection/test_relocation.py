from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from s4g_ray.cli.convert import convert_app
from s4g_ray.config.data_schema import ImageOptions
from s4g_ray.data.dataset import GeoDataset, open_dataset, write_dataset
from s4g_ray.data.image_table import VIEWS
from s4g_ray.datasets import cvusa, folder
from s4g_ray.datasets.inspection.relocation import relocate
from s4g_ray.errors import InputError
from tests.conftest import tables
from tests.support import source_trees


def list_images(dataset: GeoDataset) -> list[str]:
    """The absolute paths of all images, as they are read; each must exist."""
    found: list[str] = []
    for view in VIEWS:
        table = dataset.table(view, ["train", "val", "test", "gallery"])
        found.extend(table.uris)
        assert list(table.uris) == [uri for _, uri in source_trees.rows(dataset, view, "id", "uri")]
    assert all(Path(uri).is_file() for uri in found)
    return found


def convert_cvusa(home: Path) -> GeoDataset:
    return cvusa.convert(str(source_trees.cvusa_tree(home / "archive")), str(home / "set"))


def test_a_data_set_moves_with_the_folder_beside_it(tmp_path: Path) -> None:
    made = convert_cvusa(tmp_path / "old")
    before = list_images(made)
    shutil.move(tmp_path / "old", tmp_path / "elsewhere/new")
    opened = open_dataset(str(tmp_path / "elsewhere/new/set"))
    moved = f"{tmp_path}/elsewhere/new/"
    assert list_images(opened) == [uri.replace(f"{tmp_path}/old/", moved) for uri in before]
    assert opened.fingerprint == made.fingerprint


def test_images_that_moved_alone_are_found_by_an_option_or_once_for_all(tmp_path: Path) -> None:
    made = convert_cvusa(tmp_path / "old")
    count = len(list_images(made))
    shutil.move(tmp_path / "old/archive", tmp_path / "photos")
    assert not Path(open_dataset(made.uri).table("queries", ["train"]).uris[0]).exists()
    images = ImageOptions(str(tmp_path / "photos"))
    assert len(list_images(open_dataset(made.uri, images))) == count
    for wrong in ("photos/streetview", "none"):
        with pytest.raises(InputError, match=r"looked for are not there, as .*; give the folder"):
            relocate(made.uri, str(tmp_path / wrong))
    done = CliRunner().invoke(
        convert_app, ["relocate", made.uri, str(tmp_path / "photos"), "--json"]
    )
    assert done.exit_code == 0, done.output
    values: dict[str, Any] = json.loads(done.stdout)
    assert (values["relative"], values["absolute"]) == (count, 0)
    opened = open_dataset(made.uri)
    assert len(list_images(opened)) == count
    assert opened.fingerprint == made.fingerprint
    shutil.move(made.uri, tmp_path / "set")  # beside the photos now, and stored absolute before
    assert len(list_images(open_dataset(str(tmp_path / "set")))) == count


def test_tiles_of_a_region_beside_the_photos_move_along(tmp_path: Path) -> None:
    home = tmp_path / "old"
    lines = ["path,lat,lon"]
    for number in range(4):
        name = f"{number}.png"
        source_trees.save_view(home / "photos" / name, number, 0, (8, 8))
        source_trees.save_view(home / "region/tiles" / name, number, 1, (8, 8))
        lines.append(f"{name},{number},{number}")
    source_trees.write_lines(home / "photos/queries.csv", lines)
    columns = {
        "id": range(4),
        "place_id": range(4),
        "uri": [f"tiles/{number}.png" for number in range(4)],
        "lat": [0.0, 1.0, 2.0, 3.0],
        "lon": [0.0, 1.0, 2.0, 3.0],
        "split": ["train"] * 4,
    }
    tiles = pa.table({name: list(values) for name, values in columns.items()})
    region = write_dataset(str(home / "region"), tiles, tiles, name="region")
    made = folder.convert(
        str(home / "photos"), str(home / "set"), references=region.uri, max_distance_m=100
    )
    before = list_images(made)
    home.rename(tmp_path / "new")
    found = list_images(open_dataset(f"{tmp_path}/new/set"))
    assert found == [uri.replace(str(home), f"{tmp_path}/new") for uri in before]


def test_a_data_set_of_absolute_paths_alone_has_no_folder_to_name(tmp_path: Path) -> None:
    references, queries = tables()
    number = references.column_names.index("uri")
    column = [[f"s3://bucket/{name}" for name in references["uri"].to_pylist()]]
    write_dataset(
        str(tmp_path / "set"),
        references.set_column(number, "uri", column),
        queries.set_column(number, "uri", column),
        name="n",
    )
    with pytest.raises(InputError, match=r"all paths of images are absolute.*again with --name"):
        relocate(str(tmp_path / "set"), str(tmp_path))
