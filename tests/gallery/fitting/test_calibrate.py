"""Calibrating a small gallery in memory: queries are turned pieces of its own ground."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from s4g_ray.data.dataset import GeoDataset, write_dataset
from s4g_ray.errors import InputError
from s4g_ray.gallery.calibration import Calibration
from s4g_ray.gallery.fitting.calibrate import CalibrationOptions, fit_gallery
from s4g_ray.gallery.fitting.query_search import find_true_ids
from s4g_ray.gallery.locate import locate
from tests.support.tiny_gallery import PIXELS, TinyGallery, make_ground, position_of

NUM_QUERIES = 120
OPTIONS = CalibrationOptions(refine=False)


def write_queries(
    folder: Path, gallery: TinyGallery, *, ground_seed: int = 5, offset_deg: float = 0.0
) -> GeoDataset:
    """Write pieces of a ground with noise; the gallery's tiles are the references."""
    rng = np.random.default_rng(2)
    ground = make_ground(seed=ground_seed)
    folder.mkdir()
    rows: list[dict[str, Any]] = []
    for i in range(NUM_QUERIES):
        x = int(rng.integers(0, ground.shape[1] - PIXELS))
        y = int(rng.integers(0, ground.shape[0] - PIXELS))
        piece = ground[y : y + PIXELS, x : x + PIXELS].astype(int)
        noisy = np.clip(piece + rng.normal(0, 12, piece.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{i}.png")
        lat, lon = position_of(x + PIXELS / 2, y + PIXELS / 2)
        rows.append(
            {
                "id": i,
                "place_id": i // 2,
                "uri": f"{i}.png",
                "lat": lat + offset_deg,
                "lon": lon,
                "split": "test",
            }
        )
    references = pa.table(
        {
            "id": gallery.tiles.ids,
            "place_id": np.arange(gallery.num_tiles),
            "uri": [f"tile-{i}.png" for i in gallery.tiles.ids],
            "lat": gallery.tiles.lat,
            "lon": gallery.tiles.lon,
            "split": ["gallery"] * gallery.num_tiles,
        }
    )
    return write_dataset(str(folder), references, pa.Table.from_pylist(rows), name=folder.name)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> TinyGallery:
    return TinyGallery(tmp_path_factory.mktemp("gallery"))


@pytest.fixture(scope="module")
def dataset(gallery: TinyGallery, tmp_path_factory: pytest.TempPathFactory) -> GeoDataset:
    return write_queries(tmp_path_factory.mktemp("queries") / "inside", gallery)


@pytest.mark.usefixtures("one_thread")
def test_a_calibration_is_fitted_assessed_and_used(
    gallery: TinyGallery, dataset: GeoDataset, tmp_path: Path
) -> None:
    gallery_any: Any = gallery
    report = fit_gallery(gallery_any, dataset, None, options=OPTIONS)
    assert report.outside.startswith("simulated")
    assert report.assessment.num_inside >= 50
    assert report.assessment.recall_at_1 > 0.2
    assert report.assessment.ece < 0.25  # of 60 queries
    assert report.calibration.weights_sha256 == "a" * 64
    assert report.calibration.report["turns"] == 1
    low, high = report.assessment.coverage_90_interval or (0, 0)
    (warning,) = report.warnings
    assert f"{report.assessment.num_covered} photos tell" in warning
    assert f"known to ± {50 * (high - low):.0f} points" in warning
    assert report.calibration.report["warnings"] == [warning]
    assert datetime.fromisoformat(report.calibration.created) <= datetime.now(UTC)
    report.calibration.save(gallery.uri)
    assert Calibration.load(gallery.uri) == report.calibration
    gallery.has_calibration = True
    try:
        answers = locate(gallery_any, gallery.images[:20], top=5)
    finally:
        gallery.has_calibration = False
    located = [answer for answer in answers if answer.is_located]
    assert len(located) >= 10
    for answer in located:
        assert answer.radius_50_m is not None
        assert answer.radius_90_m is not None
        assert 0 < answer.radius_50_m <= answer.radius_90_m
        assert answer.candidates[0].probability is not None


@pytest.mark.usefixtures("one_thread")
def test_queries_of_another_ground_serve_as_outside(
    gallery: TinyGallery, dataset: GeoDataset, tmp_path: Path
) -> None:
    gallery_any: Any = gallery
    outside = write_queries(tmp_path / "outside", gallery, ground_seed=77, offset_deg=5.0)
    report = fit_gallery(gallery_any, dataset, outside, options=OPTIONS)
    assert report.outside == outside.uri
    assert report.assessment.num_outside == NUM_QUERIES // 2
    with pytest.raises(InputError, match=r"0 of 120 queries of .* have a tile in the gallery"):
        fit_gallery(gallery_any, outside, None, options=OPTIONS)
    with pytest.raises(InputError, match=r"0 of 120 queries of .* lie outside the gallery"):
        fit_gallery(gallery_any, dataset, dataset, options=OPTIONS)


def test_the_true_tile_is_the_nearest_that_holds_the_query(
    gallery: TinyGallery, dataset: GeoDataset
) -> None:
    gallery_any: Any = gallery
    queries = dataset.table("queries", ["test"])
    found = find_true_ids(gallery_any, dataset, queries)
    for row in range(len(queries)):
        north = (queries.lat[row] - gallery.tiles.lat) * 111_195
        east = (queries.lon[row] - gallery.tiles.lon) * 111_195 * np.cos(np.radians(47))
        away = np.hypot(north, east)
        assert away[gallery.tiles.rows(found[row])] <= away.min() + 0.1  # some lie halfway


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outside_share": 0.0}, "--outside-share 0 "),
        ({"max_false_none": 1.0}, "--max-false-none 1 "),
        ({"turns": 0}, "--turns 0 "),
        ({"max_queries": 10}, "--max-queries 10"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(OPTIONS, **changes)


def test_a_split_without_queries_is_named(gallery: TinyGallery, dataset: GeoDataset) -> None:
    gallery_any: Any = gallery
    with pytest.raises(InputError, match=r"no queries of split train; there are: test \(120\)"):
        fit_gallery(gallery_any, dataset, None, options=replace(OPTIONS, splits=("train",)))
