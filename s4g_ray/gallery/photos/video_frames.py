"""Read frames of a video at even times, by OpenCV."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from s4g_ray.config.data_schema import Size
from s4g_ray.errors import InputError
from s4g_ray.gallery.opencv import import_cv2
from s4g_ray.gallery.photos.photo import Photo, shrink
from s4g_ray.storage import files

_EARLY_S = 1e-3  # times of frames are rounded in files


def read_frames(path: str, every_s: float, *, least: Size | None = None) -> Iterator[Photo]:
    """Yield the first frame, and then one every every_s seconds of the video's own time.

    Frames are upright as the video's rotation tag asks, and named `PATH@SECONDSs`. A video that
    cannot be opened, or holds no frame, yields one photo with its error; so does any video where
    OpenCV is not installed, and one in an object store.
    """
    if not files.is_local(path):
        yield Photo(path, None, error="a video is read from a local file; copy it here first")
        return
    try:
        cv2 = import_cv2("a video")
    except InputError as error:
        yield Photo(path, None, error=str(error))
        return
    capture = cv2.VideoCapture(path)
    num_frames = 0
    try:
        for seconds, image in _due_frames(cv2, capture, every_s):
            num_frames += 1
            pixels = np.ascontiguousarray(image[..., ::-1])
            yield Photo(f"{path}@{seconds:.2f}s", shrink(pixels, least))
    finally:
        capture.release()
    if num_frames == 0:
        yield Photo(path, None, error="OpenCV finds no frame of a video in it")


def _due_frames(cv2: Any, capture: Any, every_s: float) -> Iterator[tuple[float, Any]]:
    """Yield seconds and BGR pixels of the frames that are due; the others are not converted."""
    due_s = 0.0
    number = 0
    rate = capture.get(cv2.CAP_PROP_FPS)
    while capture.grab():
        seconds = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        if seconds <= 0 and number and rate > 0:  # a container without times
            seconds = number / rate
        number += 1
        if seconds < due_s - _EARLY_S:
            continue
        is_read, image = capture.retrieve()
        if is_read:
            yield seconds, image
        due_s += every_s * (1 + max(0, int((seconds - due_s) / every_s)))
