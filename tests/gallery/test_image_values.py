"""A gallery of images of 16 bits answers as one of the same images in bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from s4g_ray import open_gallery
from s4g_ray.data.dataset import write_dataset
from s4g_ray.data.pixels.image_values import ImageValues
from tests.conftest import SIZE, tile
from tests.data.pixels.test_image_values import encode_tiff
from tests.support.galleries import build

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 6
FACTOR = 10  # of the values in 16 bits; 0 to 255 * FACTOR are shown


def write_gallery(folder: Path, images: list[NDArray[Any]], values: ImageValues) -> str:
    for number, image in enumerate(images):
        path = folder / f"data/{number}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_tiff(image))
    ids = np.arange(len(images))
    columns = {
        "id": ids,
        "place_id": ids,
        "uri": [f"{number}.tif" for number in ids],
        "lat": ids / 10,
        "lon": ids / 10,
        "split": ["gallery"] * len(ids),
    }
    queries = {**columns, "split": ["test"] * len(ids)}
    tables = (pa.table(columns), pa.table(queries))
    dataset = write_dataset(str(folder / "data"), *tables, name="tiles", values=values)
    build(folder, dataset.uri, folder / "gallery")
    return str(folder / "gallery")


def test_tiles_and_photos_of_16_bits_are_seen_as_their_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    images = [tile(rng) for _ in range(COUNT)]
    scaled = [image.astype(np.uint16)[:, :, ::-1] * FACTOR for image in images]
    # bands in another order, and one more
    banded = [np.concatenate([image, image[:, :, :1]], axis=2) for image in scaled]
    named = ImageValues(f"0,{255 * FACTOR}", (3, 2, 1))
    plain = open_gallery(write_gallery(tmp_path / "plain", images, ImageValues()))
    other = open_gallery(write_gallery(tmp_path / "banded", banded, named))
    ids = np.arange(COUNT)
    np.testing.assert_array_equal(plain.embedding_of(ids), other.embedding_of(ids))
    for number, image in enumerate(images):
        np.testing.assert_array_equal(other.read_tile(number), image)
    assert images[0].shape == (SIZE, SIZE, 3)
    answers = [
        gallery.locate([encode_tiff(image) for image in shown], top=3)
        for gallery, shown in ((plain, images), (other, banded))
    ]
    found, wanted = ([answer.to_json() for answer in some] for some in answers)
    assert found == wanted
    assert [answer.candidates[0].id for answer in answers[1]] == ids.tolist()
    (refused,) = plain.locate([encode_tiff(banded[0])])
    assert refused.error is not None
    assert "has 4 bands: name those to show" in refused.error
