"""Read a gallery's calibration, and check that it fits a search."""

from __future__ import annotations

import threading
import time
import weakref
from typing import TYPE_CHECKING

from s4g_ray.gallery.calibration import Calibration

if TYPE_CHECKING:
    from s4g_ray.gallery.gallery import Gallery

READ_EVERY_S = 10.0  # a service sees a new calibration after so long
_LOCK = threading.Lock()
_READ: weakref.WeakKeyDictionary[Gallery, tuple[int, float, Calibration | None]] = (
    weakref.WeakKeyDictionary()
)


def find_calibration(gallery: Gallery, turns: int) -> tuple[Calibration | None, str | None]:
    """Return the calibration of a gallery for a search with `turns`, and a note for the user.

    None, with the reason, where there is none, or it was fitted on other weights or turns. One of
    an earlier version of the gallery is used, and named.
    """
    found = _read(gallery)
    if found is None:
        return None, _missing("the gallery is not calibrated")
    weights = gallery.snapshot.header.model.get("weights_sha256")
    if weights and found.weights_sha256 and weights != found.weights_sha256:
        reason = (
            f"calibrated for weights {found.weights_sha256[:12]}, the gallery has {weights[:12]}"
        )
        return None, _missing(reason)
    if found.turns != turns:
        reason = f"calibrated with turns={found.turns}, and searched with turns={turns}"
        return None, _missing(reason, f" --turns {turns}") + f", or search with {found.turns}"
    if found.gallery_version is not None and found.gallery_version != gallery.version:
        return found, (
            f"calibrated on version {found.gallery_version} of the gallery, searched in version"
            f" {gallery.version}"
        )
    return found, None


def _missing(reason: str, options: str = "") -> str:
    return (
        f"probabilities and radii are unknown: {reason}; run"
        f" `s4g gallery calibrate GALLERY DATASET{options}`"
    )


def _read(gallery: Gallery) -> Calibration | None:
    """Read the calibration again for a new version, and every READ_EVERY_S."""
    now = time.monotonic()
    with _LOCK:
        known = _READ.get(gallery)
    if known is not None and known[0] == gallery.version and now - known[1] < READ_EVERY_S:
        return known[2]
    found = Calibration.load(gallery.uri) if gallery.has_calibration else None
    with _LOCK:
        _READ[gallery] = (gallery.version, now, found)
    return found
