"""Draw how a gallery's calibration does: a reliability diagram with counts.

A table, calibration.json, passes between the packages: `s4g gallery calibrate` writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from s4g_ray.amounts import count_noun
from s4g_ray.errors import InputError, RunError
from s4g_ray.pipeline.report.svg_charts import BLUE, SOFT, add_legend, make_axes, to_svg
from s4g_ray.storage import files
from s4g_ray.storage.store_errors import reraise_outage

FILE = "calibration.json"
FOOT = -0.06  # of the diagram
HIGHEST_BAR = 0.2


@dataclass(frozen=True)
class CalibrationPart:
    """The part of a page about a calibration: the diagram, and its figures in words."""

    chart: str
    gallery: str
    lines: list[str]


def read_calibration(gallery_uri: str) -> CalibrationPart:
    """Read calibration.json of a gallery, and draw it.

    Raises InputError where the gallery is not calibrated, or by an earlier version.
    """
    uri = files.join(files.absolute(gallery_uri), FILE)
    if not files.exists(uri):
        raise InputError(f"{gallery_uri} has no {FILE}; run `s4g gallery calibrate` first")
    try:
        report = files.read_json(uri)["report"]
    except (RunError, KeyError, TypeError) as error:
        if isinstance(error, RunError):
            reraise_outage(error)
        raise InputError(f"{uri} cannot be read: {error}; calibrate the gallery again") from error
    if not report.get("reliability"):
        raise InputError(
            f"{uri} holds no reliability curve: an earlier version wrote it; run"
            " `s4g gallery calibrate` again"
        )
    name = gallery_uri.rstrip("/").rsplit("/", 1)[-1]
    return CalibrationPart(draw_reliability(report["reliability"]), name, describe(report))


def draw_reliability(bins: list[dict[str, Any]]) -> str:
    """Draw the share of right answers over the probability that was told, with counts as bars.

    bins: `confidence` and `accuracy`, means of a bin, and `queries` in it.
    """
    figure, axes = make_axes(width=5.2, height=4.4)
    axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle="--", label="perfect")
    x = [one["confidence"] for one in bins]
    y = [one["accuracy"] for one in bins]
    axes.plot(x, y, "o-", color=BLUE, markersize=5, linewidth=1.4, label="held-out photos")
    most = max(one["queries"] for one in bins)
    heights = [HIGHEST_BAR * one["queries"] / most for one in bins]
    label = f"photos in a bin, at most {most:,}"
    axes.bar(x, heights, width=0.025, bottom=FOOT, color=SOFT, alpha=0.3, label=label, zorder=0)
    ticks = [0, 0.25, 0.5, 0.75, 1]
    axes.set(xlim=(-0.03, 1.03), ylim=(FOOT, 1.06), xticks=ticks, yticks=ticks)
    axes.set_xticklabels([f"{tick:.0%}" for tick in ticks])
    axes.set_yticklabels([f"{tick:.0%}" for tick in ticks])
    axes.set_xlabel("probability told for the first candidate")
    axes.set_ylabel("share that is right")
    add_legend(axes, loc="upper left")
    return to_svg(figure)


def describe(report: dict[str, Any]) -> list[str]:
    """Return the figures of a calibration's report as sentences."""
    photos = count_noun(report["num_inside"], "photo")
    lines = [
        f"{photos} from inside of the gallery and {report['num_outside']:,} from"
        " outside, none of which it was fitted on.",
        f"Expected calibration error {_percent(report['ece'])}"
        f" (± {_percent(report['ece_error'])}).",
    ]
    for level in ("50", "90"):
        share = report.get(f"coverage_{level}")
        if share is None:
            continue
        low, high = report[f"coverage_{level}_interval"]
        lines.append(
            f"The radius of {level} % holds the true position of {_percent(share)} of the located"
            f" photos (95 %: {_percent(low)} to {_percent(high)})."
        )
    lines.append(
        f"No answer: {_percent(report['none_inside'])} of the photos from inside,"
        f" {_percent(report['none_outside'])} of those from outside."
    )
    return lines


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
