"""Calibrate a gallery: search it for held-out queries, fit on half of them, assess on the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.data.image_table import ImageTable
from s4g_ray.errors import InputError
from s4g_ray.gallery.calibration import Calibration
from s4g_ray.gallery.fitting.assessment import Assessment, assess
from s4g_ray.gallery.fitting.calibration_fit import FEWEST_QUERIES, fit
from s4g_ray.gallery.fitting.held_out import HeldOut, halves
from s4g_ray.gallery.fitting.inlier_choice import RefinementRule, measure_refinement
from s4g_ray.gallery.fitting.query_search import QuerySearch, sample_region
from s4g_ray.progress import Reporter
from s4g_ray.storage.ownership.lease import owning

if TYPE_CHECKING:
    from s4g_ray.gallery.gallery import Gallery

NUM_CANDIDATES = 50
LEFT_OUT = 30  # candidates beyond them, which follow where true tiles are left out
MOST_QUERIES = 5000
# photos below which the share within the 90 % radius is known to 5 points at best
FEW_COVERED = 150


@dataclass(frozen=True)
class CalibrationOptions:
    """How a gallery is calibrated. Raises InputError for values out of range.

    splits: of the queries; none: `val` where the data set has it, or else `test`. turns: at which
    each query is searched; locating then uses as many. outside_share: of the queries to come that
    lie outside, expected before looking. max_false_none: the share of queries from inside that may
    not be located. max_queries: so many are drawn at random where there are more.
    """

    splits: tuple[str, ...] = ()
    turns: int = 1
    outside_share: float = 0.1
    max_false_none: float = 0.1
    max_queries: int = MOST_QUERIES
    refine: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        named = {"--outside-share": self.outside_share, "--max-false-none": self.max_false_none}
        for option, value in named.items():
            if not 0 < value < 1:
                raise InputError(f"{option} {value:g} is not between 0 and 1")
        if not 1 <= self.turns <= 360:
            raise InputError(f"--turns {self.turns} is not within 1..360")
        if self.max_queries < 2 * FEWEST_QUERIES:
            raise InputError(f"--max-queries {self.max_queries} is below {2 * FEWEST_QUERIES}")


@dataclass(frozen=True)
class CalibrationReport:
    """A calibration, and how it does on the half of the queries that it was not fitted on."""

    calibration: Calibration
    assessment: Assessment
    outside: str  # the data set of queries from outside, or how they were simulated
    refinement: dict[str, Any]
    num_unreadable: int

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user must know before relying on the figures."""
        found = self.assessment
        interval = found.coverage_90_interval
        if interval is None or found.num_covered >= FEW_COVERED:
            return ()
        reach = (interval[1] - interval[0]) / 2
        return (
            f"{found.num_covered} photos tell how many positions lie within the radii: the share"
            f" within that of 90 % is known to ± {100 * reach:.0f} points; give {2 * FEW_COVERED}"
            " photos or more, half of which are measured on, for ± 5 points",
        )

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON has it."""
        measured = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self.assessment).items()
        }
        return {
            **measured,
            "temperature": self.calibration.temperature,
            "num_candidates": self.calibration.num_candidates,
            "turns": self.calibration.turns,
            "outside": self.outside,
            "outside_share": self.calibration.outside_share,
            "refinement": self.refinement,
            "num_unreadable": self.num_unreadable,
            "warnings": list(self.warnings),
        }


def calibrate(
    gallery_uri: str,
    dataset_uri: str,
    outside_uri: str | None = None,
    *,
    options: CalibrationOptions | None = None,
    steal: bool = False,
    reporter: Reporter | None = None,
) -> CalibrationReport:
    """Calibrate a gallery on a data set's queries, and write calibration.json into it.

    outside_uri: a data set whose queries lie outside the gallery; without it they are simulated by
    leaving true tiles and their neighbors out of the candidates. Queries of `dataset_uri` without a
    tile in the gallery count as outside, too. steal: take the gallery over from a living process,
    as Lease.acquire. Raises InputError for too few queries, and while another process writes the
    gallery.
    """
    from s4g_ray.gallery.gallery import open_gallery

    outside = None
    if outside_uri is not None:
        outside = open_dataset(outside_uri, remedy="correct --outside")
    with (
        open_gallery(gallery_uri) as gallery,
        owning(gallery.uri, reporter, steal=steal) as lease,
    ):
        report = fit_gallery(
            gallery,
            open_dataset(dataset_uri),
            outside,
            options=options or CalibrationOptions(),
            reporter=reporter,
        )
        lease.check()
        report.calibration.save(gallery.uri)
    return report


def fit_gallery(
    gallery: Gallery,
    dataset: GeoDataset,
    outside: GeoDataset | None,
    *,
    options: CalibrationOptions,
    reporter: Reporter | None = None,
) -> CalibrationReport:
    """Fit and assess a calibration as calibrate does; writes nothing."""
    num_candidates = min(NUM_CANDIDATES, gallery.num_tiles)
    num_found = min(num_candidates + LEFT_OUT, gallery.num_tiles)
    search = QuerySearch(gallery, num_found, options.turns)
    queries = _choose_queries(dataset, options)
    found, num_unreadable = _search(search, dataset, queries, "queries", reporter)
    is_inside = found.true_ids >= 0
    inside = found.take(is_inside)
    if len(inside) < 2 * FEWEST_QUERIES:
        raise InputError(
            f"{len(inside)} of {len(found)} queries of {dataset.uri} have a tile in the gallery;"
            f" calibrating takes at least {2 * FEWEST_QUERIES}: give held-out queries of its region"
        )
    first, second = halves(inside.places, options.seed)
    others, origin = _find_outside(search, found.take(~is_inside), outside, options, reporter)
    if others is None:
        away = inside.without_truth(num_candidates)
        own, rest = first, second
    else:
        away = others.first(num_candidates)
        own, rest = halves(others.places, options.seed)
    known = inside.first(num_candidates)
    calibration = fit(
        known.take(first),
        away.take(own),
        num_candidates=num_candidates,
        region=sample_region(gallery),
        default_size_m=search.default_size_m,
        turns=options.turns,
        outside_share=options.outside_share,
        max_false_none=options.max_false_none,
    )
    rule = RefinementRule(None, report={"min_inliers": None, "reason": "not asked for"})
    if options.refine:
        rule = measure_refinement(
            gallery, queries, known.take(first), known.take(second), calibration
        )
    model = gallery.info.get("model", {})
    calibration = replace(
        calibration,
        min_inliers=rule.min_inliers,
        appearance=rule.appearance,
        gallery_version=gallery.version,
        weights_sha256=model.get("weights_sha256"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    assessment = assess(calibration, known.take(second), away.take(rest))
    report = CalibrationReport(calibration, assessment, origin, rule.report, num_unreadable)
    return replace(report, calibration=replace(calibration, report=report.to_json()))


def _choose_queries(dataset: GeoDataset, options: CalibrationOptions) -> ImageTable:
    """Read the queries to calibrate on, drawn at random where they are too many."""
    counts = dataset.count_splits("queries")
    splits: Sequence[str] = options.splits or ("val",)
    if not options.splits and not counts.get("val"):
        splits = ("test",)
    table = dataset.table("queries", splits)
    if not len(table):
        there = ", ".join(f"{name} ({count})" for name, count in counts.items() if count)
        raise InputError(
            f"{dataset.uri} has no queries of split {', '.join(splits)}; there are:"
            f" {there or 'none'}"
        )
    if len(table) > options.max_queries:
        rng = np.random.default_rng(options.seed)
        table = table.take(np.sort(rng.choice(len(table), options.max_queries, replace=False)))
    return table


def _search(
    search: QuerySearch,
    dataset: GeoDataset,
    queries: ImageTable,
    name: str,
    reporter: Reporter | None,
    *,
    by_place: bool = True,
) -> tuple[HeldOut, int]:
    if reporter is None:
        return search.search(dataset, queries, by_place=by_place)
    with reporter.stage(f"searching for {name}") as update:
        return search.search(dataset, queries, update, by_place=by_place)


def _find_outside(
    search: QuerySearch,
    without_tile: HeldOut,
    outside: GeoDataset | None,
    options: CalibrationOptions,
    reporter: Reporter | None,
) -> tuple[HeldOut | None, str]:
    """Search for the queries from outside -> them and their origin; None where there are none.

    Raises InputError for too few of them.
    """
    if outside is not None:
        names = [name for name, count in outside.count_splits("queries").items() if count]
        chosen = replace(options, splits=tuple(names))
        found, _ = _search(
            search,
            outside,
            _choose_queries(outside, chosen),
            "queries from outside",
            reporter,
            by_place=False,
        )
        away = found.take(found.true_ids < 0)
        if len(away) < 2 * FEWEST_QUERIES:
            raise InputError(
                f"{len(away)} of {len(found)} queries of {outside.uri} lie outside the gallery;"
                f" give at least {2 * FEWEST_QUERIES}"
            )
        return away, outside.uri
    if len(without_tile) >= 2 * FEWEST_QUERIES:
        return without_tile, "queries of the data set without a tile in the gallery"
    return None, "simulated: true tiles and their neighbors left out of the candidates"
