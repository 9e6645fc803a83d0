from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from s4g_ray.data.dataset import write_dataset
from s4g_ray.evaluation.metrics import PROTOCOLS
from s4g_ray.evaluation.scores import score
from tests.conftest import tables


def test_gallery_references_whose_place_a_query_shows_are_no_distractors(tmp_path: Path) -> None:
    """A data set whose test references are all of split `gallery` has scores in both protocols."""
    references, queries = tables(6)
    split = pa.array(["train"] * 2 + ["gallery"] * 4)
    references = references.set_column(references.column_names.index("split"), "split", split)
    test = queries.slice(0, 5).set_column(5, "split", pa.array(["train"] * 2 + ["test"] * 3))
    dataset = write_dataset(str(tmp_path), references, test, name="n")
    shown = dataset.table("queries", ["test"])
    gallery = dataset.table("references", ["test", "gallery"])
    vectors = np.eye(4, dtype=np.float32)
    found = score(dataset, "test", shown, gallery, (vectors[:3], vectors), radii_m=(50,))
    assert [found.metrics[p]["references"] for p in PROTOCOLS] == [4, 3]
    assert [found.metrics[p]["recall@1"] for p in PROTOCOLS] == [1, 1]
    assert found.for_protocol("strict")["paper"] == {"references": 3}
