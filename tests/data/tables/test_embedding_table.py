from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from s4g_ray.data.tables.embedding_table import open_embeddings, read_embedding_parts, read_heads
from s4g_ray.errors import RunError
from tests.support.embedding_tables import random_unit, write_table


def test_heads_of_many_parts_hold_their_ids_and_places_in_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folders = [
        write_table(
            tmp_path / name, rng.permutation(1000)[:370], random_unit(rng, 370, dim), part_rows=9
        )
        for name, dim in (("a", 3), ("b", 4))
    ]
    files = [
        (folder, part) for folder in folders for part in open_embeddings(folder, "references").parts
    ]
    tables = [table for folder in folders for table in read_embedding_parts(folder, "references")]
    heads = list(read_heads(files))
    assert len(heads) == len(tables) == 84
    for head, table in zip(heads, tables, strict=True):
        assert head.ids.tolist() == table.ids.tolist()
        assert head.place_ids.tolist() == table.place_ids.tolist()
        assert head.dim == table.vectors.shape[1]
    Path(folders[0], files[30][1].name).unlink()
    with pytest.raises(RunError, match=rf"{files[30][1].name} is in the manifest but missing"):
        list(read_heads(files))
