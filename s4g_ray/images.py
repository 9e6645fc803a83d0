"""Images: read, decode, size, augment (consistently across the two views of a pair), and load batches of pairs.

Images travel as uint8 [3, H, W]; the encoder normalises. Augmentation uses torchvision's v2 functional
operations with our own random draws, keyed by (seed, epoch, query id), so that a pair looks the same
whatever loads it; a reference without a query by its own id.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from s4g_ray import storage
from s4g_ray.config import AugmentConfig, DataConfig, Size
from s4g_ray.dataset import ImageTable, View
from s4g_ray.errors import BadImageError

LARGEST_JPEG = 65_500  # pixels a side
Fit = Callable[[Tensor], Tensor]
Loaded = TypeVar("Loaded")
_HEADING_STREAM = 0x686561  # as below, of the headings that embeddings see
_AUGMENT_STREAM = 0x617567  # keeps augmentation's random stream apart from others of the same (seed, epoch)
_GALLERY_STREAM = 0x676175  # as above, of references without a query


def decode(data: bytes) -> Tensor:
    """The bytes of an image file -> RGB uint8 [3, H, W], upright as its EXIF says. Raises ValueError when corrupt."""
    if not data:
        raise ValueError("the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            turned = "exif" in image.info or "xmp" in image.info  # else transposing would only copy
            return _to_tensor(ImageOps.exif_transpose(image) if turned else image)
    except UnidentifiedImageError as error:
        raise ValueError("not an image file of a known format") from error
    except Exception as error:  # a damaged file makes Pillow raise many kinds: OSError, SyntaxError, struct.error...
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _to_tensor(image: Image.Image) -> Tensor:
    if image.mode.startswith("I"):  # 16 bits of grey: Pillow would clip them to 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def resize(image: Tensor, size: Size, *, antialias: bool = True) -> Tensor:
    """uint8 [3, h, w] -> [3, H, W], bilinear, to exactly that size."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.resize(image, list(size), antialias=antialias)  # type: ignore[no-any-return]


def load_raw(table: ImageTable, row: int) -> Tensor:
    """Image of a row as it is stored: uint8 [3, h, w]. Raises BadImageError with the reason."""
    try:
        return decode(storage.read_bytes(table.uris[row], table.offsets[row], table.lengths[row]))
    except (OSError, ValueError, EOFError) as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error)
        raise BadImageError(f"id {table.ids[row]}, {table.uris[row]}: {reason}") from error


def load_view(table: ImageTable, row: int, view: View, data: DataConfig, *, seed: int) -> Tensor:
    """Image of a row as evaluation and mining see it. Raises BadImageError with the reason."""
    image = load_raw(table, row)
    if view == "references":
        return fit_reference(image, data)
    rng = np.random.default_rng((seed, int(table.ids[row]), _HEADING_STREAM))
    return look(fit_query(image, data, float(table.headings[row])), data, rng)


def fit_reference(image: Tensor, data: DataConfig) -> Tensor:
    """uint8 [3, h, w] -> data.reference_size."""
    return resize(image, data.reference_size, antialias=data.antialias)


def fit_query(image: Tensor, data: DataConfig, heading: float) -> Tensor:
    """uint8 [3, h, w] -> data.query_size: cut, sized, and turned to the north where its heading is to be used.

    heading is in degrees; raises ValueError when it is wanted and NaN (checks.check_headings comes first).
    """
    rows = min(round(data.query_cut * image.shape[1]), (image.shape[1] - 1) // 2)
    image = resize(image[:, rows : image.shape[1] - rows], data.query_size, antialias=data.antialias)
    if data.query_heading != "known" or heading == 0:
        return image
    if not np.isfinite(heading):
        raise ValueError("a query has no heading_deg, but data.query_heading=known")
    return turn_panorama(image, heading)


def turn_panorama(image: Tensor, degrees: float) -> Tensor:
    """Roll a panorama [3, H, W], so that what its centre column shows lies `degrees` clockwise of the new centre."""
    return torch.roll(image, round(degrees % 360 / 360 * image.shape[-1]), -1)


def look(panorama: Tensor, data: DataConfig, rng: np.random.Generator) -> Tensor:
    """What is seen of a panorama [3, H, W]: turned by any angle where the heading is random, and its middle part."""
    if data.query_heading == "random":
        panorama = torch.roll(panorama, int(rng.integers(panorama.shape[-1])), -1)
    width = data.visible_query_size[1]
    left = (panorama.shape[-1] - width) // 2
    return panorama[..., left : left + width]


def _as_it_is(image: Tensor) -> Tensor:
    return image


def augment_pair(
    query: Tensor,
    reference: Tensor,
    cfg: AugmentConfig,
    rng: np.random.Generator,
    fits: tuple[Fit, Fit] = (_as_it_is, _as_it_is),
) -> tuple[Tensor, Tensor]:
    """Augment the two views of a pair, uint8 [3, H, W] each; geometry is drawn once for both.

    Images as stored are brought to size by `fits`, after JPEG compression and before all else, as in the
    published order.
    """
    query, reference = _augment_view(query, cfg, rng, fits[0]), _augment_view(reference, cfg, rng, fits[1])
    if rng.random() < cfg.flip_probability:
        query, reference = F.horizontal_flip(query), F.horizontal_flip(reference)
    turns = int(rng.integers(1, 4))
    if cfg.rotate != "none" and rng.random() < cfg.rotate_probability:
        query, reference = rotate_pair(query, reference, turns, cfg.rotate)
    return query, reference


def augment_reference(reference: Tensor, cfg: AugmentConfig, rng: np.random.Generator, fit: Fit = _as_it_is) -> Tensor:
    """Augment a reference that has no query, uint8 [3, h, w], as augment_pair does those that have one."""
    reference = _augment_view(reference, cfg, rng, fit)
    if rng.random() < cfg.flip_probability:
        reference = F.horizontal_flip(reference)
    turns = int(rng.integers(1, 4))
    if cfg.rotate not in ("none", "query") and rng.random() < cfg.rotate_probability:
        reference = rotate_pair(reference, reference, turns, "reference")[1]
    return reference


def rotate_pair(query: Tensor, reference: Tensor, turns: int, how: str) -> tuple[Tensor, Tensor]:
    """Turn the reference counter-clockwise by `turns` * 90 degrees, and the query so that the pair still matches.

    A panorama's columns are azimuths, growing to the right: what lay east of a north-up tile lies on top
    once it is turned, so the columns move left by turns * W / 4 (rounded, for widths that 4 does not divide).
    Raises ValueError for a tile that is not square.
    """
    turned = [query] * (how in ("planar", "query")) + [reference] * (how != "query")
    if any(image.shape[-1] != image.shape[-2] for image in turned):
        raise ValueError("rotation by 90 degrees needs square images; set augment.rotate=none")
    if how == "panorama":
        query = torch.roll(query, -round(turns * query.shape[-1] / 4), -1)
    elif how in ("planar", "query"):
        query = torch.rot90(query, turns, (-2, -1))
    return query, reference if how == "query" else torch.rot90(reference, turns, (-2, -1))


def _augment_view(image: Tensor, cfg: AugmentConfig, rng: np.random.Generator, fit: Fit) -> Tensor:
    if rng.random() < cfg.jpeg_probability:
        image = recompress(image, int(rng.integers(cfg.jpeg_quality[0], cfg.jpeg_quality[1] + 1)))
    image = fit(image)
    if rng.random() < cfg.color_probability:
        brightness, contrast, saturation = 1 + rng.uniform(-cfg.color_strength, cfg.color_strength, 3)
        image = F.adjust_brightness(image, brightness)
        image = F.adjust_contrast(image, contrast)
        image = F.adjust_saturation(image, saturation)
        image = F.adjust_hue(image, rng.uniform(-cfg.color_strength, cfg.color_strength))
    if rng.random() < cfg.blur_probability:
        if rng.random() < 0.5:
            image = F.gaussian_blur(image, [5, 5], [rng.uniform(0.3, 1.2)] * 2)
        else:
            image = F.adjust_sharpness(image, 1 + rng.uniform(0.2, 1.0))
    if rng.random() < cfg.dropout_probability:
        image = grid_dropout(image, rng) if rng.random() < 0.5 else coarse_dropout(image, rng)
    return image


def recompress(image: Tensor, quality: int) -> Tensor:
    """What JPEG compression at a quality of 1..100 leaves of an image; larger ones than the format knows are kept."""
    if max(image.shape) > LARGEST_JPEG:
        return image
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as compressed:
        return _to_tensor(compressed)


def coarse_dropout(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Black out 10..25 squares of 10..20 % of the image's height."""
    image = image.clone()
    height, width = image.shape[-2:]
    for _ in range(int(rng.integers(10, 26))):
        side = max(1, round(rng.uniform(0.1, 0.2) * height))
        top, left = rng.integers(0, max(height - side, 0) + 1), rng.integers(0, max(width - side, 0) + 1)
        image[:, top : top + side, left : left + side] = 0
    return image


def grid_dropout(image: Tensor, rng: np.random.Generator, ratio: float = 0.4) -> Tensor:
    """Black out a square in each cell of a regular grid at a random offset, `ratio` of the cell's side."""
    image = image.clone()
    height, width = image.shape[-2:]
    cell = max(2, round(rng.uniform(0.125, 0.25) * height))
    hole = max(1, round(ratio * cell))
    rows = (np.arange(height) + int(rng.integers(cell))) % cell < hole
    columns = (np.arange(width) + int(rng.integers(cell))) % cell < hole
    image[:, torch.from_numpy(rows)[:, None] & torch.from_numpy(columns)[None, :]] = 0
    return image


@dataclass(frozen=True)
class PairBatch:
    """A rank's share of a global batch: uint8 [b, 3, H, W] for each view, valid[b] bool.

    gallery: references without a query, uint8 [e, 3, H, W], of gallery_ids[e], gallery_valid[e] bool; None
    where none were asked for.
    """

    number: int  # of the batch in its plan
    query_ids: NDArray[np.int64]
    queries: Tensor
    references: Tensor
    valid: Tensor  # false: an image of the pair could not be decoded (data.on_bad_image=skip)
    bad_images: tuple[str, ...]  # reasons
    gallery: Tensor | None = None
    gallery_ids: NDArray[np.int64] | None = None
    gallery_valid: Tensor | None = None  # false: as above, or its id is -1

    @property
    def gallery_masked(self) -> int:
        """How many gallery images could not be decoded."""
        if self.gallery_ids is None or self.gallery_valid is None:
            return 0
        return int((self.gallery_ids >= 0).sum() - self.gallery_valid.sum())


class PairLoader:
    """Loads a rank's slots of a plan, batch after batch, `num_threads` ahead of the training step."""

    def __init__(
        self,
        queries: ImageTable,
        references: ImageTable,
        data: DataConfig,
        augment: AugmentConfig,
        *,
        seed: int,
        num_threads: int = 2,
    ) -> None:
        self.queries, self.references = queries, references
        self.data, self.augment, self.seed = data, augment, seed
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="pair-loader")
        self._ahead = num_threads

    def load(
        self,
        query_ids: NDArray[np.int64],
        reference_ids: NDArray[np.int64],
        *,
        epoch: int,
        gallery_ids: NDArray[np.int64] | None = None,
    ) -> Iterator[PairBatch]:
        """query_ids[B, b], reference_ids[B, b], gallery_ids[B, e] (-1: none) -> PairBatches in order.

        Raises BadImageError if so configured.
        """
        waiting: deque[Future[PairBatch]] = deque()
        numbers = iter(range(len(query_ids)))
        try:
            while True:
                while len(waiting) <= self._ahead and (number := next(numbers, None)) is not None:
                    gallery = None if gallery_ids is None else gallery_ids[number]
                    ids = query_ids[number], reference_ids[number], gallery
                    waiting.append(self._pool.submit(self._batch, number, *ids, epoch))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _batch(
        self,
        number: int,
        query_ids: NDArray[np.int64],
        reference_ids: NDArray[np.int64],
        gallery_ids: NDArray[np.int64] | None,
        epoch: int,
    ) -> PairBatch:
        rows = zip(self.queries.rows(query_ids), self.references.rows(reference_ids), strict=True)
        bad: list[str] = []
        pairs = [self._unless_bad(partial(self._pair, int(q), int(r), epoch), bad) for q, r in rows]
        valid = torch.tensor([pair is not None for pair in pairs])
        sizes = self.data.visible_query_size, self.data.reference_size
        blank = [torch.zeros(3, *size, dtype=torch.uint8) for size in sizes]
        queries, references = (torch.stack([(pair or blank)[view] for pair in pairs]) for view in (0, 1))
        batch = PairBatch(number, query_ids, queries, references, valid, tuple(bad))
        return batch if gallery_ids is None else self._with_gallery(batch, gallery_ids, epoch)

    def _with_gallery(self, batch: PairBatch, ids: NDArray[np.int64], epoch: int) -> PairBatch:
        rows = np.full(len(ids), -1, dtype=np.int64)
        rows[ids >= 0] = self.references.rows(ids[ids >= 0])
        bad = list(batch.bad_images)
        images = torch.zeros(len(ids), 3, *self.data.reference_size, dtype=torch.uint8)
        valid = torch.zeros(len(ids), dtype=torch.bool)
        for i in np.flatnonzero(rows >= 0).tolist():
            image = self._unless_bad(partial(self._gallery_image, int(rows[i]), epoch), bad)
            if image is not None:
                images[i], valid[i] = image, True
        return replace(batch, bad_images=tuple(bad), gallery=images, gallery_ids=ids, gallery_valid=valid)

    def _unless_bad(self, load: Callable[[], Loaded], bad: list[str]) -> Loaded | None:
        """What is loaded; where bad images are skipped, None for one, and its reason joins `bad`."""
        try:
            return load()
        except BadImageError as error:
            if self.data.on_bad_image == "fail":
                raise
            bad.append(str(error))
            return None

    def _gallery_image(self, reference: int, epoch: int) -> Tensor:
        rng = np.random.default_rng((self.seed, epoch, int(self.references.ids[reference]), _GALLERY_STREAM))
        return augment_reference(
            load_raw(self.references, reference), self.augment, rng, partial(fit_reference, data=self.data)
        )

    def _pair(self, query: int, reference: int, epoch: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.seed, epoch, int(self.queries.ids[query]), _AUGMENT_STREAM))
        heading = float(self.queries.headings[query])
        fits = partial(fit_query, data=self.data, heading=heading), partial(fit_reference, data=self.data)
        images = load_raw(self.queries, query), load_raw(self.references, reference)
        panorama, tile = augment_pair(*images, self.augment, rng, fits)
        return look(panorama, self.data, rng), tile  # after a roll, which needs the whole circle
