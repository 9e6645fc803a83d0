from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from s4g_ray.gallery.fitting.assessment import assess
from s4g_ray.gallery.fitting.calibrate import CalibrationReport
from s4g_ray.gallery.fitting.calibration_fit import fit
from s4g_ray.pipeline.report.reliability import read_calibration
from s4g_ray.storage import files
from tests.support.held_out_queries import SIZE_M, make_queries, sample_ground


def test_the_calibration_that_a_gallery_keeps_has_what_the_curve_needs(tmp_path: Path) -> None:
    inside = make_queries(120, seed=1)
    outside = make_queries(60, lift=-0.4, is_inside=False, seed=3)
    calibration = fit(
        inside,
        outside,
        num_candidates=inside.scores.shape[1],
        region=sample_ground(),
        default_size_m=SIZE_M,
    )
    others = make_queries(90, seed=2)
    assessment = assess(calibration, others, outside)
    report = CalibrationReport(calibration, assessment, "simulated", {}, 0)
    replace(calibration, report=report.to_json()).save(str(tmp_path / "lake"))
    stored = files.read_json(str(tmp_path / "lake/calibration.json"))["report"]["reliability"]
    assert sum(point["queries"] for point in stored) == 90 + 60
    confidences = [point["confidence"] for point in stored]
    assert confidences == sorted(confidences)
    part = read_calibration(str(tmp_path / "lake"))
    assert part.gallery == "lake"
    assert part.chart.startswith("<svg")
    most = max(point["queries"] for point in stored)
    assert f"<!-- photos in a bin, at most {most} -->" in part.chart  # matplotlib names its texts
    assert f"90 photos from inside of the gallery and {60} from outside" in part.lines[0]
    assert f"{100 * assessment.ece:.1f} %" in part.lines[1]
