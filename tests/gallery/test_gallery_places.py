"""Galleries in an object store, and those that a cluster embeds, are those of one process."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from s4g_ray.data.dataset import GeoDataset
from s4g_ray.encoder.actors import EncoderPool
from s4g_ray.gallery.build import add_tiles, remove_tiles
from s4g_ray.gallery.gallery import open_gallery
from s4g_ray.gallery.store import embedding, images
from tests.support import galleries
from tests.support.faulty_s3 import Store


@pytest.mark.s3
def test_a_gallery_in_an_object_store_is_built_changed_and_read(
    synthetic: GeoDataset, store: Store, tmp_path: Path
) -> None:
    target = "s3://data/gallery"
    report = galleries.build(tmp_path, "s3://data/synthetic", target, splits=["test"])
    assert report.num_tiles == 24
    reader = open_gallery(target)
    tile_id = int(reader.tiles.ids[5])
    path = Path(synthetic.uri) / f"images/references/{tile_id}.png"
    assert reader.read_tile_bytes(tile_id)[0] == path.read_bytes()
    more = galleries.write_tiles(tmp_path / "more", synthetic, [1, 2])
    assert add_tiles(target, more.uri).encoded == 2
    assert remove_tiles(target, ids=np.array([1])).num_tiles == 25
    assert reader.reload()
    assert reader.version == 3
    vector = reader.encode([reader.read_tile(2)], "references")
    assert reader.search(vector, 1)[0].tolist() == [[2]]


@pytest.mark.cluster
def test_actors_embed_what_one_process_does(
    synthetic: GeoDataset,
    lent_pools: list[EncoderPool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    galleries.build(tmp_path, synthetic.uri, tmp_path / "here")
    monkeypatch.setattr(embedding, "HERE", 10)
    galleries.build(tmp_path, synthetic.uri, tmp_path / "actors")
    here = open_gallery(str(tmp_path / "here"))
    actors = open_gallery(str(tmp_path / "actors"))
    ids = here.tiles.ids
    np.testing.assert_allclose(here.embedding_of(ids), actors.embedding_of(ids), atol=1e-3)


def test_shards_are_readable_tar_files(
    synthetic: GeoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tarfile

    monkeypatch.setattr(images, "SHARD_BYTES", 100_000)
    monkeypatch.setattr(images, "READ_AT_ONCE", 16)
    galleries.build(tmp_path, synthetic.uri, tmp_path / "gallery")
    digests = {}
    shards = sorted((tmp_path / "gallery/images").iterdir())
    assert len(shards) == 3
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                digests[member.name] = hashlib.sha256(file.read()).hexdigest()
    for i in range(120):
        data = Path(synthetic.uri, f"images/references/{i}.png").read_bytes()
        assert digests.pop(f"{i}.png") == hashlib.sha256(data).hexdigest()
    assert not digests
