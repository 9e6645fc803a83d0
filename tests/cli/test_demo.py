from __future__ import annotations

import csv
import io
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pyproj import Geod
from rich.console import Console

from s4g_ray.cli import demo
from s4g_ray.cli.demo import Demo, DemoResult, Located
from s4g_ray.errors import InputError
from s4g_ray.gallery.answer import Answer
from s4g_ray.gallery.gallery import open_gallery
from s4g_ray.progress import Reporter
from s4g_ray.storage import files
from s4g_ray.storage.ownership.lease import owning
from tests.support.tiny_training import TINY_TRAINING

TINY = [
    "data.query_size=[32,32]",
    "data.reference_size=[32,32]",
    *TINY_TRAINING,
]


def run(overrides: list[str]) -> tuple[DemoResult, str]:
    """Run the demo; return its result and what it printed."""
    text = io.StringIO()
    console = Console(file=text, width=200, highlight=False, soft_wrap=True)
    made = Demo.from_overrides(overrides)
    return made.run(Reporter(console)), text.getvalue()


def test_one_call_at_a_time_cuts_the_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    cuts: list[str] = []

    def cut(_: str, target: str, *__: Any, **___: Any) -> None:
        assert (data / files.LEASE).exists()
        cuts.append(target)

    monkeypatch.setattr(demo, "convert_landsat", cut)
    made = Demo.from_overrides([f"data.uri={data}", f"run_dir={tmp_path}/run"])
    reporter = Reporter(Console(file=io.StringIO()))
    with owning(str(data)), pytest.raises(InputError, match="is being written by process"):
        made.run(reporter)
    assert cuts == []

    @contextmanager
    def wait_for_another(*_: Any, **__: Any) -> Iterator[None]:
        data.mkdir(exist_ok=True)
        (data / "dataset.json").touch()  # by another call
        yield

    with monkeypatch.context() as patch:
        patch.setattr(demo, "owning", wait_for_another)
        patch.setattr("s4g_ray.cli.runs.live.follow_run", end)
        with pytest.raises(EndError):
            made.run(reporter)
    assert cuts == []
    (data / "dataset.json").unlink()
    monkeypatch.setattr("s4g_ray.cli.runs.live.follow_run", end)
    with pytest.raises(EndError):
        made.run(reporter)
    assert cuts == [str(data)]


class EndError(Exception):
    """The demo has come to its run."""


def end(*_: Any, **__: Any) -> None:
    raise EndError


@pytest.mark.cluster
def test_the_demo_ends_with_a_table_a_picture_and_located_photos_and_resumes(
    tmp_path: Path, warm_pool: None
) -> None:
    data = tmp_path / "data"
    overrides = [*TINY, f"data.uri={data}", f"run_dir={tmp_path}/run"]
    reporter = Reporter(Console(file=io.StringIO()))
    options: dict[str, Any] = {
        "size_m": 3840.0,
        "pixels": 32,
        "queries_per_tile": 2,
        "test_queries_per_tile": 2,
    }
    demo.convert_landsat("localtileserver", str(data), reporter, **options)
    result, printed = run(overrides)
    assert result.run.finished
    for row in ("untrained encoder", "gradient correlation", "trained, epoch 1"):
        assert re.search(rf"{row} .*%.*%.*% .* k?m\b", printed), printed
    assert printed.count("median error ") == 3, printed  # two lines of evaluations, one table

    gallery = open_gallery(f"{tmp_path}/run/gallery")
    assert gallery.has_calibration
    last = printed.strip().splitlines()
    assert last[-1] == f"open the page: s4g serve {tmp_path}/run/gallery"
    named = {line.strip() for line in last[-4:-1]}
    assert named == {str(tmp_path / "run" / name) for name in ("report.html", "located.png")} | {
        f"{tmp_path}/run/gallery"
    }
    picture = np.asarray(Image.open(tmp_path / "run/located.png").convert("RGB"))
    assert picture.shape == (750, 1200, 3)
    rows = list(csv.DictReader((data / "photos/positions.csv").open()))
    assert len(result.located) == len(rows) == 8
    for one, position in zip(result.located, rows, strict=True):
        line = next(line for line in last if line.startswith(f"  {position['path']}: "))
        if one.error_m is None:
            assert f"no answer: {one.answer.reason}" in line
            continue
        truth = (float(position["lon"]), float(position["lat"]))
        _, _, away = Geod(ellps="sphere").inv(one.answer.lon, one.answer.lat, *truth)
        assert one.error_m == pytest.approx(away, rel=1e-3)
        assert f"{one.answer.lat:.4f}, {one.answer.lon:.4f}" in line
        assert json.loads(json.dumps(one.to_json()))["error_m"] == one.error_m

    again, printed = run(overrides)
    assert "is finished already" in printed
    assert "is built already" in printed
    assert [one.answer for one in again.located] == [one.answer for one in result.located]


def test_a_new_demo_names_the_command_that_resumes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [".venv/bin/s4g", "demo"])
    first = Demo.from_overrides(["train.epochs=3"])
    assert first.again == ".venv/bin/s4g demo train.epochs=3 run_dir=runs/landsat"
    (tmp_path / "runs/landsat").mkdir(parents=True)
    (tmp_path / "runs/landsat/run.json").write_text("{}")
    assert Demo.from_overrides([]).config.run_dir == "runs/landsat-2"
    again = Demo.from_overrides(shlex.split(first.again)[2:])
    assert again.is_resumed
    assert again.again == first.again
    assert again.config.train.epochs == 3


def test_a_photo_without_an_answer_gives_its_reason() -> None:
    lost = Located("data/photos/3.jpg", Answer("3.jpg", reason="two places [look] alike"), 40, 9)
    assert lost.error_m is None
    assert lost.describe() == "  3.jpg: no answer: two places [look] alike"
    found = Answer("4.jpg", lat=40.0, lon=9.0, radius_90_m=1234.0, is_located=True)
    near = Located("data/photos/4.jpg", found, 40.01, 9.0)
    assert near.describe() == (
        "  4.jpg: 40.0000, 9.0000, 90 % within 1,234 m; the truth is 1,112 m away"
    )
