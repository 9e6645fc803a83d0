"""Provide a data set to pack, the packed one, and one with bad images."""

from __future__ import annotations

from pathlib import Path

import pytest

from s4g_ray.data.dataset import GeoDataset
from s4g_ray.datasets.packing.pack import Packed, pack
from tests.support.packed_datasets import (
    SMALL,
    write_mixed,
)


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> GeoDataset:
    return write_mixed(tmp_path_factory.mktemp("data") / "mixed")


@pytest.fixture(scope="session")
def packed(mixed: GeoDataset, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return pack(mixed.uri, str(tmp_path_factory.mktemp("data") / "packed"), SMALL)


@pytest.fixture
def damaged(tmp_path: Path) -> GeoDataset:
    """Write the data set without a query of the test split, and with a truncated reference.

    Two train rows share the reference.
    """
    dataset = write_mixed(tmp_path / "damaged")
    (tmp_path / "damaged/pictures/q22.jpg").unlink()
    cut = tmp_path / "damaged/pictures/r10.png"
    cut.write_bytes(cut.read_bytes()[:-40])
    return dataset
