from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from s4g_ray.data.dataset import GeoDataset
from s4g_ray.errors import InputError
from s4g_ray.pipeline.report.examples import find_hardest, find_retrievals, shorten_middle
from s4g_ray.pipeline.report.page import EvaluatedRun, read_results, result_values, write_report
from s4g_ray.storage import files
from tests.support.evaluated_runs import GRID, SOUTH, write_ground, write_run

NUM = GRID * GRID


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> GeoDataset:
    return write_ground(tmp_path_factory.mktemp("ground") / "data")


@pytest.fixture(scope="module")
def run(ground: GeoDataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Queries are their references, but 9 and 17, which resemble 40 and 41, 17 more than 9."""
    references = np.eye(NUM)
    queries = references.copy()
    queries[9] = references[40] + 0.5 * references[9]
    queries[17] = references[41] + 0.1 * references[17]
    folder = tmp_path_factory.mktemp("runs") / "a <b> run"
    write_run(folder, ground, queries=queries, references=references)
    return str(folder)


def test_the_hardest_mistakes_come_first_with_their_ids_files_and_scores(run: str) -> None:
    evaluated = EvaluatedRun.read(run)
    results = read_results(evaluated)
    assert np.flatnonzero(~results.is_right()[:, 0]).tolist() == [9, 17]
    first, second = find_hardest(results, evaluated.config)
    query, own, wrong, *_ = first.tiles
    assert [tile.kind for tile in first.tiles[:3]] == ["query", "right", "wrong"]
    assert query.details == ("id 517", "tile <17>.png")
    assert query.source.endswith("/images/tile <17>.png")
    assert own.details == ("id 517", "tile <17>.png")
    scores = results.queries.ids == 517
    assert own.caption == f"its own: rank 2, {results.own_scores[scores][0]:.2f}"
    assert wrong.details == ("id 541", "tile <41>.png")
    assert wrong.caption == f"1. {results.scores[scores, 0][0]:.2f}, 192 m"
    assert second.tiles[0].details == ("id 509", "tile <9>.png")


def test_queries_that_find_a_semi_positive_tile_are_no_mistakes(tmp_path: Path) -> None:
    ground = write_ground(tmp_path / "data", has_semi_positives=True)
    references = np.eye(NUM)
    queries = references.copy()
    for place in range(10):
        queries[place] = 2 * references[place + 1] + 0.1 * references[place]
    queries[30] = references[40] + 0.5 * references[30] + 0.6 * references[31]
    write_run(tmp_path / "run", ground, queries=queries, references=references)
    evaluated = EvaluatedRun.read(str(tmp_path / "run"))
    results = read_results(evaluated)
    first = results.is_semi_positive()[:, 0]
    assert results.queries.place_ids[first].tolist() == list(range(10))
    (hardest,) = find_hardest(results, evaluated.config)
    assert hardest.tiles[0].details[0] == "id 530"
    kinds = [tile.kind for tile in hardest.tiles[1:4]]
    assert kinds == ["right", "wrong", "semi-positive"]
    shown = next(find_retrievals(results, evaluated.config))
    assert "semi-positive" in [tile.kind for tile in shown.tiles]
    page = Path(write_report(str(tmp_path / "run"))).read_text()
    assert "reference is semi-positive" in page


def test_the_page_is_whole_escaped_and_loads_nothing(run: str) -> None:
    page = Path(write_report(run)).read_text()
    assert "Hardest mistakes" in page
    assert "reference is semi-positive" not in page
    assert "tile &lt;17&gt;.png" in page
    assert "a &lt;b&gt; run" in page
    assert f"<td>{SOUTH}</td>" in page
    assert "<b> run" not in page
    assert page.count("<svg") == 3
    assert len(re.findall(r'<img class="map" src="data:image/jpeg;base64,', page)) == 1
    assert "544 m by" not in page  # the ground has 512 m a side, and a margin
    for outside in ("<script", "<link", 'src="http', "url(http", "@import"):
        assert outside not in page


def test_a_report_follows_a_data_set_that_has_moved_and_refuses_another(
    tmp_path: Path, synthetic: GeoDataset
) -> None:
    ground = write_ground(tmp_path / "data")
    vectors = np.eye(NUM)
    run = str(tmp_path / "run")
    write_run(tmp_path / "run", ground, queries=vectors, references=vectors)
    before = Path(write_report(run)).read_text()
    moved = str(tmp_path / "moved")
    Path(ground.uri).rename(moved)
    with pytest.raises(InputError, match="; if it has moved, name it with --dataset"):
        write_report(run)
    after = Path(write_report(run, dataset=moved)).read_text()
    assert after.count("data:image") == before.count("data:image") > 5
    with pytest.raises(InputError, match=f"than {synthetic.uri} now .* --name '<ground>"):
        write_report(run, dataset=synthetic.uri)


def test_the_values_of_a_report_are_those_of_its_table(run: str) -> None:
    values = result_values(run)
    assert values["dataset"] == "<ground> & co"
    names = [result["name"] for result in values["results"]]
    assert names == ["untrained encoder", "trained, epoch 2"]
    assert values["results"][-1]["recall@1"] == 0.5


def test_a_folder_without_an_evaluated_run_is_refused(run: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run\.json is missing"):
        write_report(str(tmp_path))
    with pytest.raises(InputError, match="run `s4g gallery calibrate` first"):
        write_report(run, gallery=str(tmp_path))
    files.write_json(str(tmp_path / "calibration.json"), {"report": {"ece": 0.1}})
    with pytest.raises(InputError, match="holds no reliability curve"):
        write_report(run, gallery=str(tmp_path))


def test_the_curve_of_a_calibration_stands_on_the_page(run: str, tmp_path: Path) -> None:
    bins = [
        {"confidence": 0.2, "accuracy": 0.25, "queries": 81},
        {"confidence": 0.8, "accuracy": 0.7, "queries": 1234},
    ]
    report = {
        "reliability": bins,
        "num_inside": 900,
        "num_outside": 415,
        "ece": 0.061,
        "ece_error": 0.01,
        "coverage_50": 0.52,
        "coverage_50_interval": [0.47, 0.57],
        "coverage_90": None,
        "coverage_90_interval": None,
        "none_inside": 0.1,
        "none_outside": 0.9,
    }
    files.write_json(str(tmp_path / "lake/calibration.json"), {"report": report})
    model = {"architecture": "net", "weights_sha256": "0" * 64}
    files.write_json(str(tmp_path / "lake/gallery.json"), {"model": model})
    page = Path(write_report(run, gallery=str(tmp_path / "lake"))).read_text()
    assert page.count("<svg") == 4
    assert "model, net, is none of this run&#39;s checkpoints" in page
    assert "Calibration of lake" in page
    assert "Expected calibration error 6.1 % (± 1.0 %)" in page
    assert "true position of 52.0 % of the located photos (95 %: 47.0 % to 57.0 %)" in page
    assert "radius of 90 %" not in page


def test_an_unfinished_run_says_so(ground: GeoDataset, tmp_path: Path) -> None:
    write_run(tmp_path / "run", ground, queries=np.eye(NUM), references=np.eye(NUM))
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    page = Path(write_report(str(tmp_path / "run"))).read_text()
    assert "Unfinished" not in page
    assert page.count("<svg") == 3
    metrics.write_text("".join(line for line in lines if '"kind": "epoch"' not in line))
    page = Path(write_report(str(tmp_path / "run"))).read_text()
    assert "Unfinished: 0 of 2 epochs are trained." in page
    assert "<h2>Epochs</h2>" not in page
    assert page.count("<svg") == 2  # no bars of the time


def test_long_names_keep_their_start_and_their_end() -> None:
    name = "satellite_40.7309416656_-73.9953203614.png"
    assert shorten_middle(name, 42) == name
    short = shorten_middle(name, 21)
    assert short == "satellite_…203614.png"
    assert len(short) == 21
