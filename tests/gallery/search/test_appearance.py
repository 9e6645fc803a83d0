"""The look of photos: other cameras are told apart, other orientations and sizes are not."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from s4g_ray.gallery.search.appearance import Appearance, describe_look
from tests.support import landsat


def looks_of(bands: tuple[int, ...], count: int, seed: int) -> np.ndarray:
    places = landsat.find_places(overlap=0.0)
    rng = np.random.default_rng(seed)
    scene = landsat.open_scene("landsat.tif", bands)
    rows = rng.choice(len(places), count, replace=False)
    queries = [landsat.cut_query(scene, places.lat[i], places.lon[i], rng) for i in rows]
    return np.stack([describe_look(query.picture) for query in queries])


def test_another_band_looks_unusual_and_the_same_bands_do_not() -> None:
    fitted = Appearance.fit(looks_of(landsat.SWIR, 60, seed=1))
    own = looks_of(landsat.SWIR, 60, seed=2)
    thermal = looks_of(landsat.THERMAL, 60, seed=3)
    assert np.mean([fitted.is_usual(look) for look in own]) >= 0.8
    assert np.mean([fitted.is_usual(look) for look in thermal]) <= 0.02


def test_a_photo_like_no_other_does_not_let_everything_pass() -> None:
    rng = np.random.default_rng(1)
    looks = rng.normal(0, 1, (50, 13))
    looks[7] = 300.0
    fitted = Appearance.fit(looks)
    assert np.mean([fitted.is_usual(look) for look in rng.normal(0, 1, (200, 13))]) > 0.8
    assert not fitted.is_usual(looks[7])


def test_turned_and_smaller_pictures_look_the_same() -> None:
    places = landsat.find_places(overlap=0.0)
    picture = landsat.open_scene().cut(places.lat[9], places.lon[9], metres=7.5, pixels=256)
    look = describe_look(picture)
    turned = describe_look(np.ascontiguousarray(np.rot90(picture)))
    np.testing.assert_allclose(look, turned, atol=2e-3)  # of a reduction in whole grey values
    half = Image.fromarray(picture).resize((128, 128), Image.Resampling.BOX)
    np.testing.assert_allclose(look, describe_look(np.asarray(half)), atol=0.02)


def test_distances_are_those_of_mahalanobis() -> None:
    rng = np.random.default_rng(0)
    looks = rng.normal(5, 2, (4000, 13)) @ rng.normal(0, 1, (13, 13))
    fitted = Appearance.fit(looks[:300])
    mean = looks[:300].mean(axis=0)
    scale = looks[:300].std(axis=0)
    standard = (looks[:300] - mean) / scale
    covariance = standard.T @ standard / 300 + 0.05 * np.eye(13)
    for look in looks[300:310]:
        away = (look - mean) / scale
        expected = away @ np.linalg.solve(covariance, away)
        assert fitted.distances(look[None])[0] == pytest.approx(expected)
    refused = np.mean([not fitted.is_usual(look) for look in looks[300:]])
    assert refused == pytest.approx(0.05, abs=0.03)
