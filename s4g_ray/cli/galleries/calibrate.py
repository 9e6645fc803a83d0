"""Define `s4g gallery calibrate`: fit probabilities, radii and `none` on held-out queries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from s4g_ray.cli.console import Steal, interruptible, make_reporter, print_json
from s4g_ray.freed_memory import keep_freed_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from s4g_ray.gallery.fitting.calibrate import CalibrationReport
    from s4g_ray.progress import Reporter


def calibrate(
    gallery: Annotated[str, typer.Argument(help="A gallery: a folder or s3://...")],
    dataset: Annotated[
        str, typer.Argument(help="A canonical data set whose queries have known positions.")
    ],
    outside: Annotated[
        str | None,
        typer.Option(
            help="A data set whose queries lie outside the gallery.  [default: they are simulated]"
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Splits of queries, joined by commas.  [default: val, or else test]"),
    ] = None,
    turns: Annotated[
        int, typer.Option(help="At which each query is searched; `s4g locate` then needs as many.")
    ] = 1,
    outside_share: Annotated[
        float, typer.Option(help="The share of photos to come that you expect from outside.")
    ] = 0.1,
    max_false_none: Annotated[
        float, typer.Option(help="The share of photos from inside that may get no answer.")
    ] = 0.1,
    max_queries: Annotated[
        int, typer.Option(help="Draw so many at random where there are more.")
    ] = 5000,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine/--no-refine",
            help="Choose how many inliers an exact position needs (overhead queries).",
        ),
    ] = True,
    steal: Steal = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Calibrate a gallery: fit on half of the queries, report on the other half.

    Afterwards `s4g locate` gives probabilities, radii, exact positions and `none`.
    """
    keep_freed_memory()
    from s4g_ray.gallery.fitting.calibrate import CalibrationOptions
    from s4g_ray.gallery.fitting.calibrate import calibrate as calibrate_gallery

    options = CalibrationOptions(
        splits=tuple(name.strip() for name in split.split(",")) if split else (),
        turns=turns,
        outside_share=outside_share,
        max_false_none=max_false_none,
        max_queries=max_queries,
        refine=refine,
    )
    reporter = make_reporter(as_json)
    with interruptible("interrupted; the gallery is as it was"):
        report = calibrate_gallery(
            gallery, dataset, outside, options=options, steal=steal, reporter=reporter
        )
    show(report, gallery, turns, as_json, reporter)


def show(
    report: CalibrationReport, gallery: str, turns: int, as_json: bool, reporter: Reporter
) -> None:
    """Show a table of a calibration's quality, or JSON, and what was written."""
    if not as_json:
        reporter.console.print(make_table(report))
    for line in describe_end(report, gallery, turns):
        reporter.line(line)
    print_json(as_json, report.to_json())


def describe_end(report: CalibrationReport, gallery: str, turns: int) -> Iterator[str]:
    """Yield the warnings of a calibration, what was written, and what it changes."""
    for warning in report.warnings:
        yield f"warning: {warning}"
    searches = f" (searches with --turns {turns})" if turns > 1 else ""
    yield (
        f"wrote calibration.json into {gallery}: answers of `s4g locate` and `s4g serve`{searches}"
        " now have probabilities and radii, and are `none` where a photo is likely from outside"
    )


def make_table(report: CalibrationReport) -> Table:
    """Make a table of a calibration's quality on the half that it was not fitted on."""
    from rich.table import Table

    found = report.assessment
    table = Table(title="on queries that were not fitted on", show_header=False, box=None)
    answered = f"{found.num_located:,} of {found.num_inside:,}, {found.share_located:.1%}"
    rows = [
        ("queries inside, outside", f"{found.num_inside:,}, {found.num_outside:,}"),
        ("outside", report.outside),
        ("best candidate right", f"{found.recall_at_1:.1%}"),
        ("calibration error (ECE)", f"{found.ece:.3f} ± {found.ece_error:.3f}"),
        ("Brier score (0 to 2)", f"{found.brier:.3f} ± {found.brier_error:.3f}"),
        ("answered of inside", answered),
        ("`none` of inside", _describe_share(found.none_inside, found.none_inside_interval)),
        ("`none` of outside", _describe_share(found.none_outside, found.none_outside_interval)),
    ]
    for name, share, interval, radius_m in (
        ("50 %", found.coverage_50, found.coverage_50_interval, found.median_radius_50_m),
        ("90 %", found.coverage_90, found.coverage_90_interval, found.median_radius_90_m),
    ):
        if share is not None and interval is not None and radius_m is not None:
            text = f"{_describe_share(share, interval)}; median radius {radius_m:,.0f} m"
            rows.append((f"within the radius of {name}", text))
    rows.append(("inliers of an exact position", _describe_inliers(report.refinement)))
    if report.num_unreadable:
        rows.append(("unreadable queries", f"{report.num_unreadable:,}"))
    for name, text in rows:
        table.add_row(name, text)
    return table


def _describe_share(share: float, interval: tuple[float, float]) -> str:
    return f"{share:.1%} (95 % interval {interval[0]:.1%} to {interval[1]:.1%})"


def _describe_inliers(refinement: dict[str, Any]) -> str:
    least = refinement.get("min_inliers")
    if least is None:
        return f"none: {refinement.get('reason', 'not measured')}"
    found = refinement["found_of_right_tiles"]
    wrong = refinement["wrong_of_accepted"]
    return (
        f"{least} or more: {found:.0%} of {refinement['num_right_tiles']} right tiles,"
        f" {wrong:.1%} of positions wrong; {refinement['false_of_elsewhere']} of"
        f" {refinement['num_elsewhere']} tiles elsewhere accepted (below"
        f" {refinement['most_false']:.1%} with 95 %)"
    )
