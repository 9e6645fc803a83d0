"""Find the exact position of an answer within its best candidates."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from s4g_ray.errors import RunError, first_line
from s4g_ray.gallery.answer import Answer, Candidate
from s4g_ray.gallery.search.appearance import describe_look

if TYPE_CHECKING:
    from s4g_ray.gallery.calibration import Calibration
    from s4g_ray.gallery.gallery import Gallery
    from s4g_ray.gallery.photos.photo import Photo
    from s4g_ray.gallery.refinement import Refined

NUM_REFINED = 3  # best candidates that are compared with the photo
_UNCALIBRATED = (
    "not refined: no calibration chose how many inliers an exact position needs; run"
    " `s4g gallery calibrate`"
)
_UNUSUAL = (
    "not refined: the photo looks unlike those of the calibration that were placed exactly; for"
    " another camera, run `s4g gallery calibrate` on its photos"
)
_REMOVED = "not compared: tile {} was removed from the gallery meanwhile"
_NO_GROUND = "not refined: the position or the ground size of the best tiles is unknown"


def refine_answer(
    answer: Answer, photo: Photo, gallery: Gallery, calibration: Calibration | None
) -> Answer:
    """Return the answer with its exact position, where one of its best candidates gives it.

    The position with the most inliers counts, if it has as many as the calibration asks for.
    Without a calibration, or tiles of known size, or for a photo unlike those of the calibration,
    nothing is refined, and the note says so. A tile that cannot be read, or was removed meanwhile,
    is left out, and the note names it.
    """
    from s4g_ray.gallery.refinement import find_features, refine_position

    if not answer.is_located or photo.pixels is None:
        return answer
    if calibration is None:
        return _add_note(answer, _UNCALIBRATED)
    if calibration.min_inliers is None:
        reason = calibration.report.get("refinement", {}).get("reason")
        return _add_note(answer, f"not refined: {reason}" if reason else _UNCALIBRATED)
    appearance = calibration.appearance
    if appearance is not None and not appearance.is_usual(describe_look(photo.pixels)):
        return _add_note(answer, _UNUSUAL)
    compared = [one for one in answer.candidates[:NUM_REFINED] if _has_ground(one)]
    if not compared:
        return _add_note(answer, _NO_GROUND)
    best: Refined | None = None
    features = find_features(photo.pixels)
    for candidate in compared:
        try:
            tile = gallery.read_tile(candidate.id)
        except KeyError:
            answer = _add_note(answer, _REMOVED.format(candidate.id))
            continue
        except RunError as error:
            answer = _add_note(answer, f"not compared: {first_line(error)}")
            continue
        refined = refine_position(
            features,
            tile,
            lat=candidate.lat,
            lon=candidate.lon,
            size_m=candidate.size_m,
            min_inliers=calibration.min_inliers,
            tile_id=candidate.id,
        )
        if refined is not None and (best is None or refined.inliers > best.inliers):
            best = refined
    if best is None:
        return answer
    return dataclasses.replace(answer, refined=best, heading_deg=best.heading_deg)


def _add_note(answer: Answer, note: str) -> Answer:
    notes = [one for one in (answer.note, note) if one]
    return dataclasses.replace(answer, note="; ".join(notes))


def _has_ground(candidate: Candidate) -> bool:
    return all(math.isfinite(x) for x in (candidate.lat, candidate.lon, candidate.size_m))
