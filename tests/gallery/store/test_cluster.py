"""A gallery in shards says what it needs where no Ray cluster is named."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from s4g_ray.cli.app import app
from s4g_ray.config.schema import MiningConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.errors import InputError
from s4g_ray.gallery.gallery import open_gallery
from s4g_ray.gallery.store import cluster, index_writer, vectors
from s4g_ray.gallery.store.header import GalleryHeader
from s4g_ray.gallery.store.index_writer import plan_one_process
from s4g_ray.gallery.store.versions import open_version, publish_version
from tests.conftest import tiny_config
from tests.support import galleries


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a Ray session and without an address."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for module in (cluster, index_writer):
        monkeypatch.setattr(module, "is_connected", lambda: False)


@pytest.fixture(scope="module")
def built(synthetic: GeoDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    galleries.build(folder, synthetic.uri, folder / "gallery", splits=["test"])
    return folder / "gallery"


def divide(gallery: str) -> None:
    """Let the manifest of a gallery say that 3 shards hold its index."""
    version = open_version(gallery, 1)
    facts = dataclasses.replace(version.facts, is_sharded=True, num_shards=3, shard_gb=40.0)
    publish_version(
        gallery,
        1,
        version.parts,
        version.stamp,
        version.segments,
        version.images,
        version.index,
        facts,
        version.info,
    )
    header = GalleryHeader.load(gallery)
    dataclasses.replace(header, index=facts.summary()).save(gallery)


def test_without_a_cluster_it_is_described_but_not_opened(
    built: Path, tmp_path: Path, alone: None
) -> None:
    gallery = str(tmp_path / "gallery")
    shutil.copytree(built, gallery)
    divide(gallery)
    with pytest.raises(InputError, match=r"by 3 shards of 40 GB on a Ray cluster, .* RAY_ADDRESS"):
        open_gallery(gallery)
    shown = CliRunner().invoke(app, ["gallery", "info", gallery])
    assert shown.exit_code == 0, shown.output
    assert "in 3 shards of 40 GB on a Ray cluster" in " ".join(shown.output.split())


@pytest.mark.parametrize(
    ("num_shards", "address", "is_here"),
    [("auto", None, True), (1, None, True), (2, None, False), ("auto", "auto", True)],
)
def test_an_index_that_fits_stays_in_one_process(
    alone: None, num_shards: int | str, address: str | None, is_here: bool
) -> None:
    mining = MiningConfig.model_validate({"num_shards": num_shards})
    config = tiny_config("-", "-", ray={"address": address}).model_copy(update={"mining": mining})
    assert (plan_one_process(config, 1000, 64) is not None) == is_here


@pytest.mark.parametrize(
    ("num_shards", "address", "is_refused"),
    [("auto", None, True), (1, "auto", True), (2, None, False), ("auto", "auto", False)],
)
def test_one_that_does_not_fit_goes_to_a_cluster_that_is_named(
    alone: None,
    monkeypatch: pytest.MonkeyPatch,
    num_shards: int | str,
    address: str | None,
    is_refused: bool,
) -> None:
    monkeypatch.setattr(vectors, "available_memory_gb", lambda: 0.001)
    mining = MiningConfig.model_validate({"num_shards": num_shards})
    config = tiny_config("-", "-", ray={"address": address}).model_copy(update={"mining": mining})
    if not is_refused:
        assert plan_one_process(config, 10**6, 64) is None
        return
    with pytest.raises(InputError, match=r"does not fit in .* name a Ray cluster by ray\.address"):
        plan_one_process(config, 10**6, 64)
