"""The published form and this project on the same tiny data, and docs/paper.md's table of tests."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.published.comparison import train_both
from benchmarks.published.tiny_cvusa import write_tree
from s4g_ray.config.loading import valid_keys
from s4g_ray.config.schema import RunConfig

ROOT = Path(__file__).parents[2]


@pytest.mark.usefixtures("one_thread")
def test_both_forms_have_the_same_losses_neighbors_and_recalls(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree", 96, 120)
    found = train_both(tmp_path, batch_size=16, num_steps=5, num_hard=4)
    published, here = (np.array(losses) for losses in found.losses)
    assert len(published) == 5
    assert np.abs(published - here).max() < 1e-5
    assert np.ptp(published) > 1e-3  # the steps differ
    assert found.located_alike == 1
    assert found.mined_alike == 1
    assert found.before[0] == pytest.approx(found.before[1])
    assert found.after[0] == pytest.approx(found.after[1])
    assert found.after[0] != found.before[0]


def read_rows() -> list[list[str]]:
    """Read the table of docs/paper.md whose last column names tests."""
    text = (ROOT / "docs/paper.md").read_text()
    table = text.split("| published setting | here | test |\n")[1].split("\n\n")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]
    ]


def test_each_published_setting_names_a_test_that_is_there() -> None:
    rows = read_rows()
    assert len(rows) > 15
    for setting, _, tests in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", tests)
        assert named, setting
        for path, name in named:
            assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), name


def test_each_published_setting_names_keys_that_are_there() -> None:
    keys = set(valid_keys(RunConfig))
    for setting, here, _ in read_rows():
        named = re.findall(r"`([a-z_]+(?:\.[a-z_]+)?)(?:=[^`]*)?`", here)
        assert named, setting
        assert set(named) <= keys, setting
