"""Schemes of fsspec: hf:// is read, and a scheme without a client has one message."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.registry import _registry

from s4g_ray.data.dataset import open_dataset
from s4g_ray.data.image_table import VIEWS
from s4g_ray.errors import InputError, StoreError
from s4g_ray.storage import files
from tests.conftest import write_synthetic
from tests.support.fake_hub import REPO, Hub, fake_hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with fake_hub() as running:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": running.address, "token": False})
        yield running


def test_a_data_set_of_the_hub_is_read_like_a_folder(hub: Hub, tmp_path: Path) -> None:
    local = write_synthetic(tmp_path / "data")
    for path in tmp_path.rglob("*"):
        if path.is_file():
            hub.files[str(path.relative_to(tmp_path))] = path.read_bytes()
    remote = open_dataset(f"hf://datasets/{REPO}/data")
    assert (remote.name, remote.fingerprint) == (local.name, local.fingerprint)
    for view in VIEWS:
        tables = [getattr(dataset, view).to_table() for dataset in (local, remote)]
        assert tables[0].drop_columns("uri").equals(tables[1].drop_columns("uri"))
    table = remote.table("queries", ["test"])
    uri = table.uris[0]
    assert uri.startswith(f"hf://datasets/{REPO}/data/")
    assert (
        files.read_bytes(uri)
        == Path(uri.replace(f"hf://datasets/{REPO}", str(tmp_path))).read_bytes()
    )
    assert hub.tokens == {""}


def test_files_of_the_hub_are_listed_read_in_ranges_and_missed(hub: Hub) -> None:
    root = f"hf://datasets/{REPO}"
    hub.files = {"a/b.bin": b"0123456789", "a/c/d.bin": b"x", "e#f g.txt": b"text"}
    assert files.list_names(root) == ["a", "e#f g.txt"]
    assert files.list_names(f"{root}/a") == ["b.bin", "c"]
    assert files.list_names(f"{root}/none") == []
    assert files.read_bytes(f"{root}/a/b.bin", 2, 3) == b"234"
    assert files.exists(f"{root}/a/b.bin")
    assert not files.exists(f"{root}/a/none.bin")
    with pytest.raises(FileNotFoundError):
        files.read_bytes(f"{root}/a/none.bin")


def test_a_hub_that_does_not_answer_is_one_message(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        fsspec.config.conf, "hf", {"endpoint": "http://127.0.0.1:9", "token": False}
    )
    uri = f"hf://datasets/{REPO}/x.bin"
    for call in (files.read_bytes, files.list_names, files.exists):
        with pytest.raises(StoreError, match=r"hf://.*Error.*check the name, the network"):
            call(uri)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "gcs://bucket/x",
            r"gcs://bucket/x.*: write gs://\.\.\. for gcs://, which needs no client",
        ),
        ("abfs://container/x", "write az://"),
        ("sftp://host/x", "the client of sftp:// is not installed; pip install paramiko"),
        ("nope://x/y", "nope.*use a local path, s3://, gs://, az:// or hf://"),
    ],
)
def test_a_scheme_that_cannot_be_opened_has_one_message(uri: str, message: str) -> None:
    for call in (files.read_bytes, files.list_names, files.exists, open_dataset):
        with pytest.raises(InputError, match=message) as caught:
            call(uri)
        assert "\n" not in str(caught.value)


def test_hf_without_its_client_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(_registry, "hf", raising=False)
    with pytest.raises(InputError, match=r"client of hf:// is not installed; pip install hugg"):
        files.read_bytes("hf://datasets/o/n/x")
