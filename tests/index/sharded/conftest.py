"""Fixtures of the tests of a service: references, queries, two shards for a whole module."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from s4g_ray.index.sharded.service import IndexService
from tests.support.embedding_tables import Array, random_unit, write_table
from tests.support.index_services import Collection, Started, config


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """430 references in two tables, with 20 vectors that occur three times each."""
    rng = np.random.default_rng(5)
    folder = tmp_path_factory.mktemp("embeddings")
    ids = rng.permutation(9000)[:430]
    vectors = random_unit(rng, 430)
    vectors[100:120] = vectors[300:320] = vectors[400:420]
    tables = [
        write_table(folder / "a", ids[:230], vectors[:230]),
        write_table(folder / "b", ids[230:], vectors[230:], part_rows=70),
    ]
    return Collection(ids, vectors, tables)


@pytest.fixture(scope="module")
def queries(collection: Collection) -> Array:
    rng = np.random.default_rng(6)
    return np.concatenate([random_unit(rng, 30), collection.vectors[400:410]])


@pytest.fixture(scope="module")
def started(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """A service of two shards for all tests of this module; each test uses its own versions."""
    folder = tmp_path_factory.mktemp("index")
    with IndexService(config(), str(folder)) as service:
        yield Started(service, folder)
