from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s4g_ray.arrays import Ints
from s4g_ray.data.dataset import GeoDataset, write_dataset
from s4g_ray.data.exclusions import Exclusions, PlacePairs
from s4g_ray.data.places import Places
from s4g_ray.data.sphere import metres_between
from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.data.train_split import GalleryReferences, TrainSplit
from s4g_ray.sampling.compact_graph import CompactGraph
from s4g_ray.sampling.gallery_negatives import GALLERY_STREAM, choose_gallery
from tests.conftest import tables, tiny_config

FIRST = 1000  # place id of the first gallery place


class Scene:
    """Places 0..P-1 with pairs, and gallery places FIRST.. without.

    All lie at random within a few kilometres; a tenth has no coordinates.
    """

    def __init__(
        self, seed: int, num_places: int, num_gallery: int, k: int, radius: float, batch_size: int
    ) -> None:
        rng = np.random.default_rng(seed)
        ids = np.concatenate([np.arange(num_places), FIRST + np.arange(num_gallery)])
        lat = rng.uniform(50, 50.05, len(ids))
        lon = rng.uniform(8, 8.08, len(ids))
        lat[rng.random(len(ids)) < 0.1] = np.nan
        gallery = np.arange(num_places, len(ids))
        owners = np.sort(
            np.append(np.arange(num_gallery), rng.integers(0, num_gallery, 2 * num_gallery))
        )
        places = Places(ids[gallery], lat[gallery], lon[gallery])
        self.references = GalleryReferences(
            rng.permutation(10**6)[: len(owners)], FIRST + owners, places
        )
        # the last three ids are not in the gallery
        neighbors = FIRST + np.argsort(rng.random((num_places, num_gallery + 3)), axis=1)[:, :k]
        neighbors[rng.random(neighbors.shape) < 0.05] = -1
        known = rng.permutation(num_places)[: num_places - num_places // 8]
        self.neighbors = {
            p: [n for n in neighbors[p].tolist() if n in places.ids] for p in known.tolist()
        }
        self.graph = CompactGraph.from_graph(
            NeighborGraph(known, neighbors[known]), np.sort(known), k, among=places.ids
        )
        semi = PlacePairs.from_arrays(
            rng.integers(0, num_places, 6), FIRST + rng.integers(0, num_gallery, 6)
        )
        self.exclusions = Exclusions(Places(ids, lat, lon), semi, radius)
        self.batches = np.stack([rng.permutation(num_places)[:batch_size] for _ in range(3)])

    def choose(self, num: int, batches: Ints | None = None, epoch: int = 1) -> Ints:
        batches = self.batches if batches is None else batches
        return choose_gallery(
            batches,
            self.graph,
            self.references,
            num=num,
            seed=5,
            epoch=epoch,
            exclusions=self.exclusions,
        )[0]


def may_join(places: list[int], candidate: int, exclusions: Exclusions) -> bool:
    """Return whether a gallery place is new and beyond the radius of all places of a batch."""
    places_of = exclusions.places
    position = {
        int(i): (a, b) for i, a, b in zip(places_of.ids, places_of.lat, places_of.lon, strict=True)
    }
    semi = set(
        zip(
            exclusions.semi_positives.first.tolist(),
            exclusions.semi_positives.second.tolist(),
            strict=True,
        )
    )
    for place in places:
        if (place, candidate) in semi or candidate == place:
            return False
        metres = metres_between(*position[place], *position[candidate])
        if exclusions.radius_m > 0 and metres <= exclusions.radius_m:
            return False
    return True


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_places=st.integers(8, 20),
    num_gallery=st.integers(1, 60),
    k=st.integers(0, 12),
    radius=st.sampled_from([0.0, 150.0, 800.0, 4000.0]),
    num=st.integers(1, 24),
)
def test_a_batch_takes_the_neighbors_of_its_places_rank_by_rank_then_any_allowed_place(
    seed: int, num_places: int, num_gallery: int, k: int, radius: float, num: int
) -> None:
    scene = Scene(seed, num_places, num_gallery, min(k, num_gallery), radius, batch_size=6)
    found, stats = choose_gallery(
        scene.batches,
        scene.graph,
        scene.references,
        num=num,
        seed=5,
        epoch=1,
        exclusions=scene.exclusions,
    )
    place_of = dict(
        zip(scene.references.ids.tolist(), scene.references.place_ids.tolist(), strict=True)
    )
    mined = 0
    drawn = 0
    for number, batch in enumerate(scene.batches):
        allowed = {
            p for p in set(place_of.values()) if may_join(batch.tolist(), p, scene.exclusions)
        }
        order = np.random.default_rng((5, 1, number, GALLERY_STREAM)).permutation(batch).tolist()
        nearest = [scene.neighbors.get(place, []) for place in order]
        ranked = [row[rank] for rank in range(k) for row in nearest if rank < len(row)]
        wanted = [p for p in dict.fromkeys(ranked) if p in allowed][:num]
        chosen = [place_of[i] for i in found[number].tolist() if i >= 0]
        assert chosen[: len(wanted)] == wanted
        assert len(set(chosen)) == len(chosen) == min(num, len(allowed))
        assert set(chosen) <= allowed
        assert (found[number][len(chosen) :] == -1).all()
        mined += len(wanted)
        drawn += len(chosen) - len(wanted)
    assert (stats.num_mined, stats.num_drawn, stats.num_slots) == (mined, drawn, 3 * num)
    assert stats.num_missing == 3 * num - mined - drawn


def test_the_references_of_a_batch_do_not_depend_on_the_other_batches() -> None:
    scene = Scene(1, 20, 50, 3, 150.0, 6)
    whole = scene.choose(24)
    assert np.array_equal(scene.choose(24, scene.batches[:2]), whole[:2])
    others = scene.batches[[1, 0, 2]]
    assert np.array_equal(scene.choose(24, others)[2], whole[2])
    assert not np.array_equal(scene.choose(24, epoch=2), whole)


def test_without_a_graph_every_place_and_each_of_its_references_is_as_likely() -> None:
    owners = np.repeat(np.arange(10), [1, 4] * 5)
    places = Places(FIRST + np.arange(10), np.zeros(10), np.zeros(10))
    references = GalleryReferences(np.arange(len(owners)) + 7, FIRST + owners, places)
    found, stats = choose_gallery(
        np.arange(8000).reshape(4000, 2), None, references, num=3, seed=0, epoch=0
    )
    assert stats.num_drawn == found.size
    counts = np.bincount(found.ravel() - 7, minlength=len(owners))
    expected = found.size / 10 / np.repeat([1, 4] * 5, [1, 4] * 5)
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


def test_exclusions_without_the_gallery_are_refused_and_an_empty_gallery_gives_none() -> None:
    scene = Scene(0, 20, 30, 3, 150.0, 6)
    everything = scene.exclusions.places
    places = Places(everything.ids[:20], everything.lat[:20], everything.lon[:20])
    narrow = Exclusions(places, scene.exclusions.semi_positives, 150.0)
    with pytest.raises(ValueError, match=r"exclusions within 150 m lack 30 of 30 gallery places"):
        choose_gallery(
            scene.batches, None, scene.references, num=4, seed=0, epoch=0, exclusions=narrow
        )
    none = np.zeros(0, dtype=np.int64)
    empty = GalleryReferences(none, none, Places(none, np.zeros(0), np.zeros(0)))
    found, stats = choose_gallery(scene.batches, None, empty, num=4, seed=0, epoch=0)
    assert (found == -1).all()
    assert stats.num_missing == found.size == 12
    with pytest.raises(ValueError, match="not in rows of the gallery's places"):
        choose_gallery(scene.batches, scene.graph, empty, num=4, seed=0, epoch=0)


@pytest.fixture
def with_gallery(tmp_path: Path) -> GeoDataset:
    """Return places 100..103 with pairs, 300..302 without, and a gallery tile of place 102.

    Of 300..302 the first is in train, the others in the gallery.
    """
    references, queries = tables(4)
    more = pa.table(
        {
            "id": [10, 11, 12, 13, 14],
            "place_id": [300, 301, 300, 102, 302],
            "uri": ["x.jpg"] * 5,
            "lat": [1.0, 2.0, 3.0, 4.0, None],
            "lon": [5.0, 6.0, 7.0, 8.0, None],
            "split": ["train", "gallery", "train", "gallery", "gallery"],
        }
    )
    both = pa.concat_tables([references, more], promote_options="permissive")
    return write_dataset(str(tmp_path / "d"), both, queries, name="with gallery")


def test_gallery_references_are_those_of_the_splits_whose_place_has_no_pair(
    with_gallery: GeoDataset,
) -> None:
    def read_gallery(*splits: str) -> GalleryReferences:
        sampling = {"gallery_negatives": 2, "gallery_splits": list(splits)}
        config = tiny_config("r", with_gallery.uri, sampling=sampling)
        gallery = TrainSplit.read(config, with_gallery).gallery
        assert gallery is not None
        return gallery

    train = read_gallery("train")
    assert (train.ids.tolist(), train.place_ids.tolist()) == ([10, 12], [300, 300])
    assert train.places.ids.tolist() == [300]
    assert train.places.lat.tolist() == [1.0]
    assert train.places.lon.tolist() == [5.0]
    both = read_gallery("train", "gallery")
    assert (both.ids.tolist(), both.place_ids.tolist()) == ([10, 12, 11, 14], [300, 300, 301, 302])
    assert both.places.ids.tolist() == [300, 301, 302]
    np.testing.assert_array_equal(both.places.lat, [1.0, 2.0, np.nan])
