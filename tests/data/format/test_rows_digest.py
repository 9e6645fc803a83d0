from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from s4g_ray.data.dataset import write_dataset
from tests.conftest import tables


def fingerprint(folder: Path, queries: pa.Table, **options: Any) -> str:
    return write_dataset(str(folder), tables()[0], queries, name="n", **options).fingerprint


def test_the_fingerprint_does_not_depend_on_where_the_data_set_and_its_images_are(
    tmp_path: Path,
) -> None:
    queries = tables()[1]
    number = queries.column_names.index("uri")

    def at(folder: str) -> pa.Table:
        names = pa.array([f"{folder}/{name}" for name in queries["uri"].to_pylist()])
        return queries.set_column(number, "uri", names)

    wanted = fingerprint(tmp_path / "a", queries)
    for place in (tmp_path / "b/set", tmp_path / "photos/set"):
        root = str(tmp_path / "photos")
        assert fingerprint(place, at(root), images_root=root) == wanted
    folders = ("/one/x", "/two/y/x", "s3://bucket/y/x", "gs://x", "../x", "../../x", "/one\ntwo//x")
    elsewhere = {fingerprint(tmp_path / f"e{n}", at(folder)) for n, folder in enumerate(folders)}
    assert elsewhere == {fingerprint(tmp_path / "e", at("x"))}
    assert fingerprint(tmp_path / "f", at("sub")) != wanted  # a folder below is a part of the name
    named = queries.append_column("source_id", pa.array(list("abcd")))
    assert fingerprint(tmp_path / "g", named) == wanted


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(
            (f"{folder}a", f"{folder}b")
            for folder in ("", "/photos/", "s3://p/", "s3://", "/a\nb/")
        ),
        *((f"../{folder}a", f"../{folder}b") for folder in ("", "photos/", "../")),
        *((f"{folder}a/x", f"{folder}b/x") for folder in ("", "../", "../photos/")),
    ],
)
def test_the_fingerprint_depends_on_the_folders_that_tell_images_apart(
    tmp_path: Path, one: str, other: str
) -> None:
    columns = tables()[1].to_pydict()
    names = [f"{one}/i.jpg", f"{other}/i.jpg", *columns["uri"][2:]]
    columns["uri"] = names
    before = fingerprint(tmp_path / "a", pa.table(columns))
    columns["uri"] = [names[1], names[0], *names[2:]]
    assert fingerprint(tmp_path / "b", pa.table(columns)) != before


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("id", [0, 1, 2, 9]),
        ("place_id", [100, 101, 102, 102]),
        ("uri", ["0.jpg", "1.jpg", "2.jpg", "3.png"]),
        ("uri", ["0.jpg", "1.jp", "g2.jpg", "3.jpg"]),
        ("lat", [-10.0, -3.3, 3.3, 10.1]),
        ("lat", [None, -3.3, 3.3, 10.0]),
        ("split", ["train", "train", "train", "test"]),
        ("region", ["x", None, None, None]),
        ("region", ["", None, None, None]),
        ("heading_deg", [0.0, None, None, None]),
        ("semi_positives", [[100], None, None, None]),
        ("semi_positives", [None, [100], None, None]),
        ("offset", [0, None, None, None]),
    ],
)
def test_the_fingerprint_depends_on_all_that_matters(
    tmp_path: Path, column: str, values: list[Any]
) -> None:
    columns = tables()[1].to_pydict()
    before = fingerprint(tmp_path / "a", pa.table(columns))
    columns[column] = values
    if column == "lat":
        columns["lon"] = [None if lat is None else 1.0 for lat in values]
    if column == "offset":
        columns["length"] = [1, None, None, None]
    if column == "id":
        columns["id"] = values
    after = fingerprint(tmp_path / "b", pa.table(columns))
    assert after != before
    assert fingerprint(tmp_path / "c", pa.table(columns)) == after
