from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from s4g_ray.data.dataset import GeoDataset
from s4g_ray.errors import InputError
from s4g_ray.pipeline.report.comparison import Comparison, name_apart, write_comparison
from tests.support.evaluated_runs import GRID, STEPS, write_ground, write_run

VECTORS = np.eye(GRID * GRID)
RECALLS = {"random": {1: 0.30, 2: 0.34, 3: 0.38}, "similarity": {1: 0.36, 2: 0.39, 3: 0.45}}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> GeoDataset:
    return write_ground(tmp_path_factory.mktemp("ground") / "data")


@pytest.fixture(scope="module")
def runs(ground: GeoDataset, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two modes of sampling, of three seeds each."""
    folder = tmp_path_factory.mktemp("runs")
    made = []
    for mode, recalls in RECALLS.items():
        for seed, recall in recalls.items():
            run = folder / f"{mode} $x$ & {seed}"
            write_run(
                run,
                ground,
                queries=VECTORS,
                references=VECTORS,
                recall=recall,
                seed=seed,
                sampling={"mode": mode},
            )
            made.append(str(run))
    return made


def test_runs_are_compared_by_what_differs_and_over_seeds(runs: list[str]) -> None:
    compared = Comparison.read(runs)
    assert compared.differing == ["seed", "sampling.mode"]
    assert compared.warnings() == []
    random, mined = compared.groups
    assert random.label == "mode random"
    mean, error = mined.mean("recall@1") or (0, 0)
    values = list(RECALLS["similarity"].values())
    assert mean == pytest.approx(np.mean(values))
    assert error == pytest.approx(np.std(values, ddof=1) / np.sqrt(3))
    difference = np.array(values) - np.array(list(RECALLS["random"].values()))
    assert mined.difference(random, "recall@1") == pytest.approx(
        (difference.mean(), difference.std(ddof=1) / np.sqrt(3), 3)
    )
    x, y = compared.runs[0].curve("evaluation", "recall@1", "step")
    assert x == [0, STEPS, 2 * STEPS]
    assert y == pytest.approx([0.1, 0.2, 0.3])


def test_runs_of_one_seed_count_once(ground: GeoDataset, tmp_path: Path) -> None:
    recalls = {"a": (3, 0.5), "b": (3, 0.7), "c": (4, 0.4)}
    for name, (seed, recall) in recalls.items():
        write_run(
            tmp_path / name,
            ground,
            queries=VECTORS,
            references=VECTORS,
            recall=recall,
            seed=seed,
        )
    compared = Comparison.read([str(tmp_path / name) for name in recalls])
    (group,) = compared.groups
    assert group.mean("recall@1") == pytest.approx((0.5, 0.1))  # of 0.6 and 0.4
    (warning,) = compared.warnings()
    assert "3 runs have 2 seeds" in warning


def test_the_page_of_several_runs_is_whole_and_escaped(runs: list[str], tmp_path: Path) -> None:
    target = tmp_path / "comparison.html"
    values = write_comparison(runs, str(target)).to_json()
    page = target.read_text()
    assert page.count("<svg") == 5
    assert "random $x$ &amp; 1" in page
    assert "sampling.mode" in page
    assert "learning_rate" not in page  # it does not differ
    assert "40.0 % ± 2.6" in page
    assert "+6.0 ± 0.6 (3)" in page
    for outside in ("<script", "<link", 'src="http', "url(http"):
        assert outside not in page
    assert values["runs"][0]["name"] == "random $x$ & 1"
    assert values["runs"][0]["differing"] == {"seed": 1, "sampling.mode": "random"}
    assert values["groups"][1]["mean_and_standard_error"]["recall@1"][0] == pytest.approx(0.4)


def test_runs_of_other_data_are_told_apart(
    ground: GeoDataset, runs: list[str], tmp_path: Path
) -> None:
    write_run(tmp_path / "long", ground, queries=VECTORS, references=VECTORS, epochs=3, recall=0.9)
    compared = Comparison.read([runs[0], str(tmp_path / "long")])
    assert compared.warnings() == ["Their last evaluations are of different epochs."]
    assert not compared.has_seeds
    assert [group.label for group in compared.groups] == [run.name for run in compared.runs]
    with pytest.raises(InputError, match="is given 2 times"):
        Comparison.read([runs[0], f"{runs[0]}/"])


def test_runs_whose_index_differs_are_no_seeds_of_each_other(
    ground: GeoDataset, tmp_path: Path
) -> None:
    made = []
    for kind in ("flat", "hnsw"):
        for seed in (1, 2):
            run = tmp_path / f"{kind}-{seed}"
            write_run(
                run,
                ground,
                queries=VECTORS,
                references=VECTORS,
                recall=0.3 + seed / 10,
                seed=seed,
                mining={"index_kind": kind},
            )
            made.append(str(run))
    compared = Comparison.read(made)
    assert [group.label for group in compared.groups] == ["index_kind flat", "index_kind hnsw"]
    assert [len(group.runs) for group in compared.groups] == [2, 2]


def test_runs_are_named_by_what_tells_their_folders_apart() -> None:
    assert name_apart(["/a/x", "/b/y"]) == ["x", "y"]
    assert name_apart(["/a/x", "/b/x", "/b/y"]) == ["a/x", "b/x", "b/y"]
