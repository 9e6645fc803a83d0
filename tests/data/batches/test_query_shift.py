"""Windows of query pictures: found back in what the loader gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from s4g_ray.config.data_schema import DataConfig
from s4g_ray.config.loading import parse_config
from s4g_ray.data.batches.query_shift import draw_window, shift_query
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.images import fit_query, load_raw
from s4g_ray.errors import InputError
from tests.conftest import SIZE
from tests.support.sample_images import augment_config, loader, make_photo

IDS = np.array([[0, 1, 2, 3], [4, 5, -1, 7]])
HEIGHT, WIDTH = 96, 128


def find_offset(image: Tensor, window: Tensor) -> tuple[int, int]:
    """Return how far a window's centre lies down and right of the image's, by correlation."""
    spectra = [
        np.fft.fft2(part[0].double().numpy() - part[0].double().mean().item())
        for part in (image, window)
    ]
    product = spectra[0] * spectra[1].conj()
    peak = np.fft.ifft2(product / np.maximum(abs(product), 1e-9)).real.argmax()
    down, right = divmod(int(peak), image.shape[-1])
    height, width = image.shape[-2:]
    return (down + height // 2) % height - height // 2, (right + width // 2) % width - width // 2


def test_the_shift_is_found_back_by_correlation() -> None:
    photo = make_photo(3, (HEIGHT, WIDTH))
    cfg = augment_config(query_shift=0.2)
    offsets = []
    for query_id in range(40):
        key = (1, 2, query_id)
        found = find_offset(photo, shift_query(photo, cfg, key))
        window = draw_window(cfg, key)
        assert found == (round(window.down * HEIGHT), round(window.right * WIDTH))
        offsets.append((window.down, window.right))
    assert np.abs(offsets).max() <= 0.2
    assert np.ptp(offsets, axis=0).min() > 0.3  # of 0.4


def test_the_window_holds_the_drawn_share_of_the_picture_and_mirrors_what_lies_beyond() -> None:
    rows = torch.arange(HEIGHT, dtype=torch.uint8)[None, :, None].expand(3, HEIGHT, WIDTH)
    cfg = augment_config(query_shift=0.3, query_scale=[0.5, 1.5])
    sides = []
    for query_id in range(60):
        window = draw_window(cfg, (1, 2, query_id))
        found = shift_query(rows, cfg, (1, 2, query_id))
        sides.append(window.side)
        assert found.shape == (3, round(window.side * HEIGHT), round(window.side * WIDTH))
        first = round((0.5 + window.down) * HEIGHT - found.shape[1] / 2)
        wanted = []
        for row in range(first, first + found.shape[1]):
            mirrored = -1 - row if row < 0 else row
            wanted.append(2 * HEIGHT - 1 - mirrored if mirrored >= HEIGHT else mirrored)
        assert found[1, :, 5].tolist() == wanted
    assert min(sides) < 0.6
    assert max(sides) > 1.4


@pytest.mark.parametrize("on_device", [False, True])
def test_the_loader_shows_a_window_of_each_query_alone(
    synthetic: GeoDataset, on_device: bool
) -> None:
    cfg = augment_config(query_shift=0.25, query_scale=[0.8, 1.2])
    made = loader(synthetic, augment=cfg, on_device=on_device)
    batches = [batch.augment() for batch in made.load(IDS, IDS, epoch=2)]
    still = list(loader(synthetic, augment=augment_config()).load(IDS, IDS, epoch=2))
    queries = synthetic.table("queries", ["train"])
    data = DataConfig(uri=synthetic.uri, query_size=(SIZE, SIZE), reference_size=(SIZE, SIZE))
    for batch, unmoved in zip(batches, still, strict=True):
        assert torch.equal(batch.references, unmoved.references)
        for slot in np.flatnonzero(batch.query_ids >= 0):
            query_id = int(batch.query_ids[slot])
            window = shift_query(load_raw(queries, query_id), cfg, (1, 2, query_id))
            assert torch.equal(batch.queries[slot], fit_query(window, data, 0.0))
            assert not torch.equal(batch.queries[slot], unmoved.queries[slot])


def test_epochs_and_queries_have_windows_of_their_own() -> None:
    cfg = augment_config(query_shift=0.2)
    keys = [(1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3)]
    assert len({draw_window(cfg, key) for key in keys}) == 4
    assert draw_window(cfg, keys[0]) == draw_window(cfg, keys[0])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"augment": {"query_shift": 0.1, "rotate": "panorama"}}, "for overhead queries"),
        (
            {"augment": {"query_shift": 0.1}, "data": {"query_fov_deg": [70, 360]}},
            "for overhead queries",
        ),
        ({"data": {"query_heading": "random"}, "augment": {"query_scale": [0.9, 1]}}, "overhead"),
        ({"augment": {"query_scale": [1.2, 0.8]}}, "two rising values within 0.25..2"),
        ({"augment": {"query_shift": 0.1}, "protocol": "paper"}, "no part of the published method"),
        ({"sampling": {"hard_positives": 0.5}, "protocol": "paper"}, "hard_positives=0.5 is no"),
        ({"train": {"soft_labels": 1}, "protocol": "paper"}, "soft_labels=1.0 is no part"),
        ({"sampling": {"hard_positives": 1, "mode": "random"}}, "needs the scores of mining"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    sections: dict[str, dict[str, object]], message: str
) -> None:
    tree: dict[str, object] = {"run_dir": "x", **sections}
    tree["data"] = {"uri": "y", **sections.get("data", {})}
    tree.setdefault("augment", {"rotate": "none"})
    with pytest.raises(InputError, match=message):
        parse_config(tree)
