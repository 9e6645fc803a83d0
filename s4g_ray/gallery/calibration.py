"""Turn similarity scores into probabilities, a position with its radii, or `none`.

The model has three parts, each fitted on held-out queries (calibration_fit.py). Scores become
probabilities by a softmax with a temperature over the candidates and one more entry: the rest of
the gallery. A logistic model of how the scores are spread gives the probability that the query
lies outside. On the ground, each candidate spreads its probability by the offsets of true
positions that were seen, and the rest by a sample of the gallery's tiles: a radius is a quantile
of that mass about the most probable point, at the level that held the asked share of held-out
queries (split conformal prediction, Vovk et al. 2005).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np

from s4g_ray.arrays import Floats, Floats32, Floats64
from s4g_ray.data.area import Area
from s4g_ray.errors import InputError, RunError
from s4g_ray.gallery.ground_mass import GroundMass
from s4g_ray.gallery.search.appearance import Appearance
from s4g_ray.storage import files
from s4g_ray.storage.store_errors import reraise_outage

FORMAT = "s4g-calibration"
VERSION = 1
FILE = "calibration.json"
FEATURES = ("best", "margin", "spread", "confidence", "typicality")


@dataclass(frozen=True)
class Judgement:
    """The probabilities of one query's candidates, and its position.

    probabilities[k]: that the candidate's tile is the right one. They, `none_probability` (the
    query lies outside the gallery) and `rest_probability` (it lies in a tile of the gallery that
    is not among the candidates) add up to 1. Position and radii are None when nothing is located,
    or no candidate has coordinates.
    """

    probabilities: Floats64
    none_probability: float
    lat: float | None
    lon: float | None
    radius_50_m: float | None  # holds the true position with probability 0.5, if inside
    radius_90_m: float | None
    is_located: bool
    reason: str | None  # why nothing is located
    rest_probability: float = 0.0


@dataclass(frozen=True)
class NoneModel:
    """A logistic model of whether a query lies outside the gallery.

    weights, center, scale: one value for each of FEATURES. threshold: a query whose log-odds of
    lying outside are above it is not located.
    """

    weights: tuple[float, ...]
    center: tuple[float, ...]
    scale: tuple[float, ...]
    bias: float
    threshold: float

    def log_odds(self, features: Floats64) -> Floats64:
        """features[M, F] -> log-odds[M] of lying outside."""
        standard = (features - np.array(self.center)) / np.array(self.scale)
        odds: Floats64 = np.clip(standard, -6, 6) @ np.array(self.weights) + self.bias
        return odds


@dataclass(frozen=True)
class Calibration:
    """What was fitted on held-out queries of one gallery, for one encoder.

    Search `num_candidates` tiles of a query, with `turns`, before `judge`. rest_logit: the log
    weight of the rest of the gallery beside its last candidate; None when there is no rest.
    offsets: quantiles of the distance from the right tile's centre to the truth, in tile sides.
    levels: of the mass on the ground, for the radii of 50 % and 90 %. typical_query[D]: the
    direction in which embeddings of usual queries differ from those of queries from outside.
    """

    temperature: float
    rest_logit: float
    none: NoneModel
    offsets: tuple[float, ...]
    levels: tuple[float, float]
    num_candidates: int
    turns: int = 1
    default_size_m: float = 1.0  # of tiles whose size is unknown
    outside_share: float = 0.1  # of queries, expected before looking
    typical_query: tuple[float, ...] = ()
    region: tuple[tuple[float, float], ...] = ()  # lat, lon of a sample of the gallery's tiles
    min_inliers: int | None = None  # of a refinement that is accepted; None: nothing is refined
    appearance: Appearance | None = None  # of photos that are refined; None: of any
    gallery_version: int | None = None
    weights_sha256: str | None = None
    created: str = ""  # ISO 8601, UTC
    report: dict[str, Any] = field(default_factory=dict)

    def judge(
        self,
        scores: Floats32,
        lat: Floats64,
        lon: Floats64,
        size_m: Floats64,
        queries: Floats32 | None = None,
        areas: Sequence[Area | None] | None = None,
    ) -> list[Judgement]:
        """Judge the candidates of M queries, best first: scores, lat, lon, size_m [M, k].

        A missing candidate has a score of -inf, an unknown coordinate or size is NaN. Candidates
        beyond `num_candidates` get probability 0. queries[M, D]: normalised embeddings, which tell
        an unusual query from others; without them it counts as a usual one. areas: where each
        query was searched; None: in the whole gallery.
        """
        shares, rest = self.shares(scores)
        outside_odds = self.none.log_odds(self.features(scores, queries))
        outside = 1 / (1 + np.exp(-outside_odds))
        judged = []
        for row in range(len(scores)):
            inside = 1 - float(outside[row])
            has_candidates = bool(np.isfinite(scores[row]).any())
            is_located = has_candidates and bool(outside_odds[row] <= self.none.threshold)
            mass = None
            if is_located:
                mass = self.ground_mass(
                    shares[row],
                    float(rest[row]),
                    lat[row],
                    lon[row],
                    size_m[row],
                    None if areas is None else areas[row],
                )
            judged.append(
                Judgement(
                    probabilities=shares[row] * inside,
                    none_probability=float(outside[row]) if has_candidates else 1.0,
                    lat=mass.lat if mass else None,
                    lon=mass.lon if mass else None,
                    radius_50_m=mass.radius(self.levels[0]) if mass else None,
                    radius_90_m=mass.radius(self.levels[1]) if mass else None,
                    is_located=is_located,
                    reason=None if is_located else self._reason(has_candidates, outside[row]),
                    rest_probability=float(rest[row]) * inside,
                )
            )
        return judged

    def shares(self, scores: Floats) -> tuple[Floats64, Floats64]:
        """Compute the probability of each candidate, and of the rest, of a query that lies inside.

        scores[M, k], best first -> shares[M, k], rest[M]; each row of both adds up to 1, but for a
        row without candidates, which is 0. A list with missing candidates, or of fewer than
        `num_candidates`, is a whole gallery: it has no rest.
        """
        judged = np.where(np.isfinite(scores), scores, -np.inf).astype(np.float64)
        judged[:, self.num_candidates :] = -np.inf
        last = judged[:, : self.num_candidates].min(axis=1, keepdims=True)
        best = judged.max(axis=1, keepdims=True)
        is_empty = np.isneginf(best)
        best = np.where(is_empty, 0.0, best)
        weights = np.exp((judged - best) / self.temperature)
        rest = np.exp((last - best) / self.temperature + self.rest_logit)
        if scores.shape[1] < self.num_candidates:
            rest = np.zeros_like(rest)
        total = np.where(is_empty, 1.0, weights.sum(axis=1, keepdims=True) + rest)
        return weights / total, (rest / total)[:, 0]

    def features(self, scores: Floats, queries: Floats32 | None) -> Floats64:
        """Describe how scores[M, k] are spread -> features[M, F], those of FEATURES."""
        shares, _ = self.shares(scores)
        valid = np.where(np.isfinite(scores), scores, np.nan)[:, : self.num_candidates]
        valid = np.where(np.isnan(valid).all(axis=1, keepdims=True), 0.0, valid)
        best = valid[:, 0]
        second = valid[:, min(1, valid.shape[1] - 1)]
        if queries is None or not self.typical_query:
            typicality = np.full(len(scores), self.none.center[FEATURES.index("typicality")])
        else:
            typicality = queries @ np.array(self.typical_query, np.float32)
        columns = [
            best,
            best - np.where(np.isnan(second), best, second),
            best - np.nanmean(valid, axis=1),
            np.log(np.maximum(shares.max(axis=1), 1e-12)),
            typicality,
        ]
        return np.stack(columns, axis=1).astype(np.float64)

    def ground_mass(
        self,
        shares: Floats64,
        rest: float,
        lat: Floats64,
        lon: Floats64,
        size_m: Floats64,
        area: Area | None = None,
    ) -> GroundMass | None:
        """Spread one query's probability on the ground; None when no candidate has a position.

        area: where it was searched, and the rest may lie.
        """
        region = np.array(self.region).reshape(-1, 2)
        if area is not None:
            region = region[area.contains(region[:, 0], region[:, 1])]
        return GroundMass.spread(
            shares,
            rest,
            lat,
            lon,
            np.where(np.isfinite(size_m), size_m, self.default_size_m),
            np.array(self.offsets),
            region,
        )

    def save(self, gallery_uri: str) -> None:
        """Write calibration.json into a gallery's folder, whole."""
        value = {"format": FORMAT, "version": VERSION, **asdict(self)}
        files.write_json(files.join(gallery_uri, FILE), value)

    def _reason(self, has_candidates: bool, outside: float) -> str:
        """Tell why there is no answer. outside: the probability."""
        if not has_candidates:
            return "the gallery has no tile there"
        most = 1 / (1 + np.exp(-self.none.threshold))
        return (
            f"it lies outside of the gallery with a probability of {outside:.0%}; no place is"
            f" given from {most:.0%} on"
        )

    @classmethod
    def load(cls, gallery_uri: str) -> Self | None:
        """Read the calibration of a gallery; None when it has none. Raises InputError."""
        uri = files.join(gallery_uri, FILE)
        if not files.exists(uri):
            return None
        remedy = "run `s4g gallery calibrate` again"
        try:
            value = files.read_json(uri)
        except RunError as error:
            reraise_outage(error)
            raise InputError(f"{error}; {remedy}") from error
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise InputError(f"{uri} is not of format {FORMAT!r}; {remedy}")
        if value.get("version") != VERSION:
            raise InputError(f"{uri} has version {value.get('version')!r}, not 1; {remedy}")
        try:
            return cls._from_json(value)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{uri} cannot be read: {error!r}; {remedy}") from error

    @classmethod
    def _from_json(cls, value: dict[str, Any]) -> Self:
        """Return the calibration of a JSON object: lists become tuples."""
        fields = {k: v for k, v in value.items() if k not in ("format", "version")}
        none: dict[str, Any] = fields["none"]
        for name in ("weights", "center", "scale"):
            none[name] = tuple(float(x) for x in none[name])
        fields["none"] = NoneModel(**none)
        if fields.get("appearance") is not None:
            fields["appearance"] = Appearance.from_json(fields["appearance"])
        fields["region"] = tuple((float(lat), float(lon)) for lat, lon in fields["region"])
        for name in ("offsets", "levels", "typical_query"):
            fields[name] = tuple(float(x) for x in fields[name])
        return cls(**fields)
