"""Locate photos: search a gallery for them, and turn what is found into answers."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from s4g_ray.arrays import Floats32, Floats64, Ints
from s4g_ray.config.data_schema import DataConfig, Size
from s4g_ray.data.area import Area
from s4g_ray.data.images import Pixels
from s4g_ray.data.photos.photo_files import is_video
from s4g_ray.data.pixels.image_values import ImageValues
from s4g_ray.errors import BadImageError, InputError
from s4g_ray.gallery.answer import Answer, Candidate
from s4g_ray.gallery.calibration import Judgement
from s4g_ray.gallery.opencv import import_cv2
from s4g_ray.gallery.photos.decode_ahead import batches_of, map_ahead, read_ahead
from s4g_ray.gallery.photos.encode_ahead import (
    MOST_CALLS,
    EncodePlan,
    embed_ahead,
    plan_encoding,
)
from s4g_ray.gallery.photos.encoder_input import InputMaker, needed_pixels, take_as_is
from s4g_ray.gallery.photos.photo import Photo, decode_photo, read_photo, shrink
from s4g_ray.gallery.photos.turned_views import find_view_kind, list_turns
from s4g_ray.gallery.search.candidates import (
    Found,
    best_positions,
    find_cells,
    group_cells,
    join_turns,
    list_groups,
)
from s4g_ray.gallery.search.options import LocateOptions, check_area
from s4g_ray.gallery.search.refine import refine_answer
from s4g_ray.gallery.search.usable_calibration import find_calibration

if TYPE_CHECKING:
    from s4g_ray.gallery.gallery import Gallery, Snapshot

DEPTH = 8  # cells that are searched for each candidate: overlapping ones are joined
FEW = 16  # images up to which no threads are started
LocatedImage = Photo | Pixels | bytes | str | Path


def locate(gallery: Gallery, images: Sequence[LocatedImage], **options: Any) -> list[Answer]:
    """Tell where each image was taken, in their order.

    images: pixels uint8 [H, W, 3], the bytes of a file, or its path or URI. options: those of
    LocateOptions. An image that cannot be read gives an answer that holds the error. Raises
    InputError for options that do not fit, and for an area without a tile of the gallery.
    """
    search = _PhotoSearch(gallery, LocateOptions(**options))
    least = needed_size(gallery)
    values = needed_values(gallery)

    def read(number: int) -> Photo:
        return search.prepare(_as_photo(images[number], number, least, values))

    numbers = range(len(images))
    if len(images) <= FEW:
        plan = search.plan(len(images), most_calls=1)
        return list(search.answer_all(map(read, numbers), plan))
    plan = search.plan(len(images))
    with ThreadPoolExecutor(plan.num_decoders, "decoder") as readers:
        photos = map_ahead(read, numbers, readers, plan.num_ahead)
        with closing(photos), closing(search.answer_ahead(photos, plan)) as answers:
            return list(answers)


def locate_files(
    gallery: Gallery, uris: Sequence[str], options: LocateOptions, *, every_s: float = 1.0
) -> Generator[Answer, None, None]:
    """Yield the answer of each photo, and of a frame every_s seconds of each video, in order.

    Photos are decoded while others are encoded; memory holds a bounded number of them. Raises
    InputError as locate.
    """
    search = _PhotoSearch(gallery, options)
    has_video = any(is_video(uri) for uri in uris)
    plan = search.plan(None if has_video else len(uris))
    photos = read_ahead(
        uris,
        every_s=every_s,
        least=needed_size(gallery),
        values=needed_values(gallery),
        prepare=search.prepare,
        num_threads=plan.num_decoders,
        num_ahead=plan.num_ahead,
    )
    with closing(photos), closing(search.answer_ahead(photos, plan)) as answers:
        yield from answers


def needed_size(gallery: Gallery) -> Size:
    """Return height and width in pixels, beyond which decoding a photo brings nothing."""
    return needed_pixels(read_model_data(gallery))


def read_model_data(gallery: Gallery) -> DataConfig:
    """Return the preprocessing of the gallery's model."""
    return gallery.config.data


def needed_values(gallery: Gallery) -> ImageValues:
    """Return how the values of photos become bytes: as those that the model was trained on."""
    data = read_model_data(gallery)
    return ImageValues(data.stretch, data.bands)


def _as_photo(image: LocatedImage, number: int, least: Size, values: ImageValues) -> Photo:
    """Return an image as a photo. Raises InputError for an array of another shape or type."""
    name = f"photo {number + 1}"
    if isinstance(image, Photo):
        return image
    if isinstance(image, str | Path):
        return read_photo(os.fspath(image), least=least, values=values)
    if isinstance(image, bytes):
        try:
            return decode_photo(image, name, least=least, values=values)
        except BadImageError as error:
            return Photo(name, None, error=str(error).removeprefix(f"{name}: "))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise InputError(
            f"{name} is {image.dtype}{list(image.shape)}; give pixels as uint8 [H, W, 3]"
        )
    return Photo(name, shrink(image, least))


@dataclass(frozen=True)
class _Candidates:
    """The tiles that were found for a batch of M photos, best first: arrays [M, k].

    group: number of the candidate that a tile belongs to, -1 for none. best_lat, best_lon [M]: the
    place of the best candidate, NaN where unknown.
    """

    found: Found
    lat: Floats64
    lon: Floats64
    size_m: Floats64
    group: Ints
    best_lat: Floats64
    best_lon: Floats64


class _PhotoSearch:
    """Answers batches of photos with the same options."""

    def __init__(self, gallery: Gallery, options: LocateOptions) -> None:
        if options.refine:
            import_cv2("finding exact positions (refine)")
        self._gallery = gallery
        self._options = options
        self._turns = list_turns(options.turns)
        data = read_model_data(gallery)
        kind = find_view_kind(data) if options.view == "auto" else options.view
        self._inputs = InputMaker(take_as_is(data), self._turns, kind, keeps_pixels=options.refine)
        self._calibration, self._note = find_calibration(gallery, options.turns)
        self._area = options.fixed_area()
        if self._area is not None:
            check_area(self._area, gallery.tiles)

    def plan(self, num_photos: int | None, *, most_calls: int = MOST_CALLS) -> EncodePlan:
        """Plan the encoding of so many photos; None: unknown."""
        data = self._inputs.data
        height, width = needed_pixels(data)
        return plan_encoding(
            data.visible_query_size,
            self._options.turns,
            device=self._gallery.encoder.device,
            num_photos=num_photos,
            most_calls=most_calls,
            # of four times the pixels that are needed, at most: shrink
            photo_bytes=12 * height * width if self._options.refine else 0,
        )

    def prepare(self, photo: Photo) -> Photo:
        """Return a photo with the inputs of the encoder; in any thread."""
        return photo if self._refuse(photo) else self._inputs.prepare(photo)

    def answer_all(self, photos: Iterable[Photo], plan: EncodePlan) -> Iterator[Answer]:
        """Yield the answer of each prepared photo, in order; all is done in this thread."""
        for batch in batches_of(photos, plan.batch_photos):
            yield from self._answer(batch, self._embed(batch, plan.num_views))

    def answer_ahead(
        self, photos: Iterable[Photo], plan: EncodePlan
    ) -> Generator[Answer, None, None]:
        """Yield as answer_all; later photos are encoded meanwhile."""
        embed = partial(self._embed, num_views=plan.num_views)
        batches = batches_of(photos, plan.batch_photos)
        with closing(embed_ahead(batches, embed, plan)) as embedded:
            for batch, embeddings in embedded:
                yield from self._answer(batch, embeddings)

    def _answer(self, photos: Sequence[Photo], embeddings: Floats32) -> list[Answer]:
        """Return an answer for each photo; embeddings [A, T, D] of those that are searched for."""
        answers = [self._refuse(photo) for photo in photos]
        asked = [i for i, refused in enumerate(answers) if refused is None]
        if asked:
            located = self._locate([photos[i] for i in asked], embeddings)
            for i, answer in zip(asked, located, strict=True):
                answers[i] = answer
        return [answer for answer in answers if answer is not None]

    def _refuse(self, photo: Photo) -> Answer | None:
        """Return the answer of a photo that cannot be searched for; None for others."""
        if photo.error is not None or (photo.pixels is None and photo.views is None):
            return Answer.from_error(photo.name, photo.error or "it has no pixels")
        if self._options.near == "exif" and photo.exif is None:
            reason = "the photo has no EXIF position to search near; name one with --near LAT,LON"
            return Answer(photo.name, reason=reason)
        return None

    def _locate(self, photos: Sequence[Photo], embeddings: Floats32) -> list[Answer]:
        candidates = self._find_candidates(photos, embeddings)
        judgements = self._judge(photos, candidates, embeddings)
        answers = []
        for row, photo in enumerate(photos):
            judgement = None if judgements is None else judgements[row]
            answer = self._make_answer(photo, candidates, row, judgement)
            if self._options.refine:
                answer = refine_answer(answer, photo, self._gallery, self._calibration)
            answers.append(answer)
        return answers

    def _embed(self, photos: Sequence[Photo], num_views: int) -> Floats32:
        """Embed the photos that are searched for, at each turn -> [A, T, D]."""
        views = [photo.views for photo in photos if photo.views is not None]
        if not views:
            return np.zeros((0, len(self._turns), self._gallery.dim), np.float32)
        inputs = np.concatenate(views)
        vectors = [
            self._gallery.encoder.embed(inputs[start : start + num_views])
            for start in range(0, len(inputs), num_views)
        ]
        return np.concatenate(vectors).reshape(len(views), len(self._turns), -1)

    def _find_candidates(self, photos: Sequence[Photo], embeddings: Floats32) -> _Candidates:
        """Search until each photo has `top` candidates, or the gallery holds no more."""
        options = self._options
        snapshot = self._gallery.snapshot  # a newer version may be opened meanwhile
        most = len(snapshot.index)
        k = min(most, max(DEPTH * options.top, self._num_judged()))
        while True:
            candidates = self._candidates_of(
                self._search(snapshot, photos, embeddings, k), snapshot
            )
            is_short = candidates.group.max(axis=1) + 1 < options.top
            # a row that is not full holds all tiles that may be searched
            if k >= most or not (is_short & (candidates.found.ids[:, -1] >= 0)).any():
                return candidates
            k = min(most, 4 * k)

    def _num_judged(self) -> int:
        return 0 if self._calibration is None else self._calibration.num_candidates

    def _search(
        self, snapshot: Snapshot, photos: Sequence[Photo], embeddings: Floats32, k: int
    ) -> Found:
        index = snapshot.index
        num_photos, num_turns, dim = embeddings.shape
        if self._options.near != "exif":
            ids, scores = index.search(embeddings.reshape(-1, dim), k, area=self._area)
        else:
            parts = [
                index.search(embeddings[row], k, area=self._area_of(photo))
                for row, photo in enumerate(photos)
            ]
            ids = np.concatenate([part[0] for part in parts])
            scores = np.concatenate([part[1] for part in parts])
        shape = (num_photos, num_turns, -1)
        return join_turns(ids.reshape(shape), scores.reshape(shape), k)

    def _area_of(self, photo: Photo) -> Area | None:
        """Return where a photo is searched; None for the whole gallery."""
        if self._options.near != "exif":
            return self._area
        assert photo.exif is not None
        assert self._options.within_m is not None
        return Area.circle(photo.exif.lat, photo.exif.lon, self._options.within_m)

    def _candidates_of(self, found: Found, snapshot: Snapshot) -> _Candidates:
        lat, lon, size_m = find_cells(found, snapshot.tiles)
        group = group_cells(found, lat, lon, size_m, self._options.top)
        best_lat, best_lon = best_positions(found, lat, lon, group)
        return _Candidates(found, lat, lon, size_m, group, best_lat, best_lon)

    def _judge(
        self, photos: Sequence[Photo], candidates: _Candidates, embeddings: Floats32
    ) -> list[Judgement] | None:
        if self._calibration is None:
            return None
        best_turn = candidates.found.turns[:, 0]
        queries = embeddings[np.arange(len(embeddings)), best_turn]
        return self._calibration.judge(
            candidates.found.scores,
            candidates.lat,
            candidates.lon,
            candidates.size_m,
            queries,
            [self._area_of(photo) for photo in photos],
        )

    def _make_answer(
        self, photo: Photo, candidates: _Candidates, row: int, judgement: Judgement | None
    ) -> Answer:
        shown = self._list_candidates(candidates, row, judgement)
        common: dict[str, Any] = {
            "photo": photo.name,
            "candidates": tuple(shown),
            "note": self._note,
            "exif": photo.exif,
        }
        if not shown:
            return Answer(reason="no tile of the gallery lies where the search may look", **common)
        if judgement is None:
            lat, lon = candidates.best_lat[row], candidates.best_lon[row]
            return Answer(
                lat=None if np.isnan(lat) else float(lat),
                lon=None if np.isnan(lon) else float(lon),
                is_located=True,
                heading_deg=shown[0].turn_deg,
                **common,
            )
        return Answer(
            lat=judgement.lat,
            lon=judgement.lon,
            radius_50_m=judgement.radius_50_m,
            radius_90_m=judgement.radius_90_m,
            heading_deg=shown[0].turn_deg if judgement.is_located else None,
            is_located=judgement.is_located,
            reason=judgement.reason,
            none_probability=judgement.none_probability,
            **common,
        )

    def _list_candidates(
        self, candidates: _Candidates, row: int, judgement: Judgement | None
    ) -> list[Candidate]:
        ids = candidates.found.ids[row].tolist()
        shown = []
        for cells in list_groups(candidates.group[row]):
            best = cells[0]
            turn = None
            if len(self._turns) > 1:
                turn = self._turns[int(candidates.found.turns[row, best])]
            probability = None
            if judgement is not None:
                probability = float(judgement.probabilities[cells].sum())
            shown.append(
                Candidate(
                    id=ids[best],
                    lat=float(candidates.lat[row, best]),
                    lon=float(candidates.lon[row, best]),
                    size_m=float(candidates.size_m[row, best]),
                    score=float(candidates.found.scores[row, best]),
                    probability=probability,
                    turn_deg=turn,
                    cells=tuple(ids[cell] for cell in cells),
                )
            )
        if judgement is not None:
            shown.sort(key=lambda candidate: -(candidate.probability or 0.0))
        return shown
