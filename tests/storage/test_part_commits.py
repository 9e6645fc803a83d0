from __future__ import annotations

from pathlib import Path

import pytest

from s4g_ray.errors import InputError, RunError
from s4g_ray.storage import files
from s4g_ray.storage.manifest import write_part
from s4g_ray.storage.part_commits import check_reached, claim_folder


def test_a_folder_whose_first_write_was_cut_off_can_be_claimed_and_one_with_other_files_cannot(
    tmp_path: Path,
) -> None:
    (tmp_path / ".embedding.json.0123abcd.tmp").write_text("{")
    for _ in range(2):
        claim_folder(str(tmp_path), "embedding.json", {"seed": 1}, "an embedding job")
    assert files.read_json(str(tmp_path / "embedding.json")) == {"seed": 1}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.tmp").write_text("mine")
    with pytest.raises(InputError, match="is not empty, and was not begun by an embedding job"):
        claim_folder(str(tmp_path / "other"), "embedding.json", {"seed": 1}, "an embedding job")


def test_values_that_differ_are_named_and_digests_in_words(tmp_path: Path) -> None:
    def claim(cells: str, weights: str, **changes: object) -> None:
        model = {"name": "tiny", "weights": files.fingerprint(weights.encode())}
        digest = files.fingerprint(cells.encode())
        values = {"seed": 1, "cells": digest, "model": model, **changes}
        claim_folder(str(tmp_path), "job.json", values, "a job", {"cells": "cells (--area)"})

    claim("a", "w")
    claim("a", "w")
    for arguments, changes, message in (
        (("b", "w"), {}, r"was begun with other cells \(--area\); remove it or choose"),
        (("a", "x"), {}, "was begun with other weights; remove"),
        (("b", "x"), {}, r"was begun with other cells \(--area\) and other weights; remove"),
        (("a", "w"), {"seed": 2}, r"was begun with \{'seed': 1\}, not \{'seed': 2\}; remove"),
        (("a", "w"), {"model": None}, r"was begun with \{'model': \{'name': .*, not .*None"),
        (("b", "w"), {"seed": 2}, r"\{'seed': 1\}, not \{'seed': 2\}, and with other cells"),
    ):
        with pytest.raises(InputError, match=message):
            claim(*arguments, **changes)


def test_the_error_of_parts_that_only_other_nodes_have_counts_them_and_names_one(
    tmp_path: Path,
) -> None:
    folder = str(tmp_path)
    parts = [write_part(folder, f"queries/part-{n}.parquet", bytes(10 + n), 1) for n in range(3)]
    check_reached(folder, parts)
    check_reached("s3://bucket/table", parts)  # all nodes reach it
    (tmp_path / parts[1].name).unlink()
    (tmp_path / parts[2].name).write_bytes(b"an earlier job's")
    message = (
        rf"^{folder} lacks 2 of 3 parts that were written, such as queries/part-1.parquet:"
        r" not all nodes reach it;"
    )
    with pytest.raises(RunError, match=message):
        check_reached(folder, parts)
