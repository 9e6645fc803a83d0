"""Import OpenCV, which is an extra."""

from __future__ import annotations

from typing import Any

from s4g_ray.errors import InputError


def import_cv2(purpose: str) -> Any:
    """Import OpenCV. Raises InputError where it is not installed, with the command that does."""
    try:
        import cv2
    except ImportError as error:
        raise InputError(
            f"{purpose} needs OpenCV, which is not installed; pip install 's4g-ray[locate]'"
        ) from error
    return cv2
