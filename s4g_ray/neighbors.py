"""Nearest places: NeighborGraph (Parquet in, Parquet out) and exact geographic neighbors on the sphere."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from s4g_ray import storage

EARTH_RADIUS_M = 6_371_008.8  # mean radius, IUGG
ROWS_PER_PART = 500_000


@dataclass(frozen=True)
class NeighborGraph:
    """The nearest places of each place.

    place_ids[P] int64, unique; neighbors[P, K] int64 place_ids, nearest first, -1 pads at the end;
    scores[P, K] float32 (inner product, or minus metres) or None. Raises ValueError for other shapes,
    repeated places, or a place among its own neighbors.
    """

    place_ids: NDArray[np.int64]
    neighbors: NDArray[np.int64]
    scores: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if self.neighbors.ndim != 2 or len(self.neighbors) != len(self.place_ids):
            raise ValueError(f"neighbors has shape {self.neighbors.shape}; [{len(self.place_ids)}, K] is wanted")
        if self.scores is not None and self.scores.shape != self.neighbors.shape:
            raise ValueError(f"scores has shape {self.scores.shape}, neighbors {self.neighbors.shape}")
        if len(np.unique(self.place_ids)) != len(self.place_ids):
            raise ValueError("place_ids repeats a place")
        if (self.neighbors == self.place_ids[:, None]).any():
            raise ValueError("a place is among its own neighbors")

    def save(
        self, uri: str, *, stamp: storage.Stamp | None = None, info: dict[str, Any] | None = None
    ) -> storage.Manifest:
        """Publish as partitioned Parquet; pads are not written."""
        parts = []
        for number, start in enumerate(range(0, max(len(self.place_ids), 1), ROWS_PER_PART)):
            rows = slice(start, start + ROWS_PER_PART)
            data = self._encode(rows)
            name = f"part-{number:05d}.parquet"
            parts.append(storage.write_part(uri, name, data, len(self.place_ids[rows])))
        return storage.publish(uri, "neighbors", parts, stamp, {**(info or {}), "k": self.neighbors.shape[1]})

    def _encode(self, rows: slice) -> bytes:
        present = self.neighbors[rows] >= 0
        offsets = pa.array(np.concatenate([[0], np.cumsum(present.sum(axis=1))]).astype(np.int32))
        table = {
            "place_id": pa.array(self.place_ids[rows]),
            "neighbors": pa.ListArray.from_arrays(offsets, pa.array(self.neighbors[rows][present])),
        }
        if self.scores is not None:
            table["scores"] = pa.ListArray.from_arrays(offsets, pa.array(self.scores[rows][present]))
        buffer = io.BytesIO()
        pq.write_table(pa.table(table), buffer)
        return buffer.getvalue()

    @classmethod
    def load(cls, uri: str, *, stamp: storage.Stamp | None = None) -> NeighborGraph:
        """Read a published graph. Raises RunError when it is unpublished, altered, or not made from `stamp`."""
        manifest = storage.open_published(uri, "neighbors", stamp)
        data = [storage.read_part(uri, part) for part in manifest.parts]
        table = pa.concat_tables([pq.read_table(io.BytesIO(part)) for part in data]).combine_chunks()
        lists = table["neighbors"].combine_chunks()
        counts = np.diff(lists.offsets.to_numpy())
        shape = (len(table), int(manifest.info["k"]))
        filled = np.arange(shape[1]) < counts[:, None]
        neighbors = np.full(shape, -1, dtype=np.int64)
        neighbors[filled] = lists.flatten().to_numpy()
        scores = None
        if "scores" in table.column_names:
            scores = np.full(shape, -np.inf, dtype=np.float32)
            scores[filled] = table["scores"].combine_chunks().flatten().to_numpy()
        return cls(table["place_id"].to_numpy(), neighbors, scores)


@dataclass(frozen=True)
class PlacePairs:
    """A symmetric set of pairs of places: for each pair (a, b) also (b, a). Sorted, each once."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]

    @classmethod
    def of(cls, first: NDArray[np.int64], second: NDArray[np.int64]) -> PlacePairs:
        """The set of first[n], second[n] and their reverse; pairs of a place with itself are left out."""
        both = np.stack([np.concatenate([first, second]), np.concatenate([second, first])], axis=1)
        unique = np.unique(both[both[:, 0] != both[:, 1]], axis=0)
        return cls(unique[:, 0], unique[:, 1])

    def __len__(self) -> int:
        return len(self.first)

    @property
    def most(self) -> int:
        """The largest number of pairs of one place."""
        return int(np.unique(self.first, return_counts=True)[1].max(initial=0))

    def contains(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each pair of first[...] and second[...] (same shape) is in the set."""
        if not len(self):
            return np.zeros(first.shape, dtype=bool)
        places = np.unique(self.first)
        keys = np.searchsorted(places, self.first) * len(places) + np.searchsorted(places, self.second)
        a, b = (np.minimum(np.searchsorted(places, x), len(places) - 1) for x in (first, second))
        known = (places[a] == first) & (places[b] == second)
        return np.asarray(known & np.isin(a * len(places) + b, keys))

    def graph(self) -> NeighborGraph:
        """The pairs as a graph of unordered neighbors."""
        places, starts, counts = np.unique(self.first, return_index=True, return_counts=True)
        neighbors = np.full((len(places), self.most), -1, dtype=np.int64)
        column = np.arange(len(self)) - np.repeat(starts, counts)
        neighbors[np.repeat(np.arange(len(places)), counts), column] = self.second
        return NeighborGraph(places, neighbors)


def places_within(
    place_ids: NDArray[np.int64], lat: NDArray[np.float64], lon: NDArray[np.float64], radius_m: float
) -> PlacePairs:
    """All pairs of places at most `radius_m` apart, from coordinates in degrees; exact, by a k-d tree."""
    a, b = cKDTree(unit_sphere(lat, lon)).query_pairs(chord_of(radius_m), output_type="ndarray").T
    inside = metres_between(lat[a], lon[a], lat[b], lon[b]) <= radius_m
    return PlacePairs.of(place_ids[a[inside]], place_ids[b[inside]])


def unit_sphere(lat: ArrayLike, lon: ArrayLike) -> NDArray[np.float64]:
    """lat[N], lon[N] in degrees -> xyz[N, 3] on the unit sphere."""
    phi, lam = np.radians(np.asarray(lat, np.float64)), np.radians(np.asarray(lon, np.float64))
    return np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)], axis=-1)


def chord_of(radius_m: float) -> float:
    """The chord on the unit sphere of a distance and 6 micrometres more: metres_between settles the border."""
    return float(2 * np.sin(min(radius_m / EARTH_RADIUS_M, np.pi) / 2) * (1 + 1e-9) + 1e-12)


def metres_between(lat_a: ArrayLike, lon_a: ArrayLike, lat_b: ArrayLike, lon_b: ArrayLike) -> NDArray[np.float64]:
    """Great-circle metres between points in degrees, elementwise (haversine, mean Earth radius)."""
    phi_a, lam_a, phi_b, lam_b = (np.radians(np.asarray(x, np.float64)) for x in (lat_a, lon_a, lat_b, lon_b))
    half = np.sin((phi_b - phi_a) / 2) ** 2 + np.cos(phi_a) * np.cos(phi_b) * np.sin((lam_b - lam_a) / 2) ** 2
    return np.asarray(2 * EARTH_RADIUS_M * np.arcsin(np.sqrt(np.minimum(half, 1.0))))


def format_metres(metres: float) -> str:
    """A distance for people: kilometres from 10 km on, metres below."""
    if not np.isfinite(metres):
        return "distance unknown"
    return f"{metres / 1000:,.0f} km" if metres >= 10_000 else f"{metres:,.0f} m"


def geographic_neighbors(
    lat: NDArray[np.float64], lon: NDArray[np.float64], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The k nearest other points of each point: lat[N], lon[N] in degrees -> indices[N, k], metres[N, k].

    Exact, nearest first, by a k-d tree on unit-sphere xyz: poles and the antimeridian need no care, memory
    is O(N k). A point is never its own neighbor; another point at the same position is. Raises ValueError
    when k is not within 1..N-1 or a coordinate is not finite.
    """
    num_points = len(lat)
    if not 1 <= k <= num_points - 1:
        raise ValueError(f"k={k} is not within 1..{num_points - 1}: there are {num_points} points")
    if not (np.isfinite(lat).all() and np.isfinite(lon).all()):
        raise ValueError("a coordinate is not finite")
    xyz = unit_sphere(lat, lon)
    found = np.asarray(cKDTree(xyz).query(xyz, k=k + 1, workers=-1)[1])
    own = found == np.arange(num_points)[:, None]
    own[~own.any(axis=1), -1] = True  # more than k points at one position: the last goes instead
    indices = found[~own].reshape(num_points, k).astype(np.int64)
    metres = metres_between(lat[:, None], lon[:, None], lat[indices], lon[indices])
    return indices, metres


def geographic_graph(
    place_ids: NDArray[np.int64],
    lat: NDArray[np.float64],
    lon: NDArray[np.float64],
    k: int,
    exclusions: PlacePairs | None = None,
) -> NeighborGraph:
    """The graph of the k nearest places, from place_ids[P] and the coordinates of each place in degrees.

    Excluded pairs are passed over, and the next nearest take their place. Scores are minus metres. Raises
    ValueError as geographic_neighbors does.
    """
    more = exclusions.most if exclusions else 0
    indices, metres = geographic_neighbors(lat, lon, min(k + more, max(len(lat) - 1, k)))
    graph = NeighborGraph(place_ids, place_ids[indices], (-metres).astype(np.float32))
    if exclusions is None or graph.scores is None:
        return graph
    kept = ~exclusions.contains(np.broadcast_to(place_ids[:, None], graph.neighbors.shape), graph.neighbors)
    order = np.argsort(~kept, axis=1, kind="stable")[:, :k]  # the kept ones first, as they stood
    kept = np.take_along_axis(kept, order, 1)
    neighbors = np.where(kept, np.take_along_axis(graph.neighbors, order, 1), -1)
    scores = np.where(kept, np.take_along_axis(graph.scores, order, 1), -np.inf)
    return NeighborGraph(place_ids, neighbors, scores.astype(np.float32))
