"""Define the keys of the sections `data` and `augment`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from s4g_ray.config.section import Section

Probability = float
Size = tuple[int, int]  # height, width in pixels
FieldOfView = float | tuple[float, float]  # degrees; a range: that of each query is drawn from it
# augment.rotate -> the sizes of data of the views that it turns by 90 degrees
TURNED_SIZES: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "panorama": ("reference_size",),
    "planar": ("query_size", "reference_size"),
    "reference": ("reference_size",),
    "query": ("query_size",),
}


@dataclass(frozen=True)
class ImageOptions:
    """What is given anew for the images of a data set; None: as dataset.json says."""

    root: str | None = None  # the folder that relative paths of images start from
    stretch: str | None = None  # of values that are not bytes
    bands: tuple[int, ...] | None = None  # that are shown, from 1


AS_WRITTEN = ImageOptions()  # all as dataset.json says


class DataConfig(Section):
    """The data set, its splits, and the preprocessing of its images."""

    uri: str  # a canonical data set: a folder or s3://...
    # the folder of its images, where they were moved since the data set was made
    images_root: str | None = None
    # images whose values are not bytes (16 bits, floating point): the range that is shown, LOW,HIGH
    # or a range for each band (LOW,HIGH;LOW,HIGH;LOW,HIGH); full: that of the values' type; none:
    # as `s4g convert stretch` has written into the data set
    stretch: str | None = None
    # images of 2, 4 or more bands: those that are shown as red, green and blue, from 1, or one
    bands: tuple[int, ...] | None = None
    # a local folder of each node for the tables of image files that its workers and embedding
    # actors share, about 50 bytes an image; none: the folder of temporary files (TMPDIR)
    cache_dir: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    # evaluated together with the test split to find the best checkpoint; none: no best checkpoint
    val_split: str | None = None
    query_size: Size = (384, 384)
    reference_size: Size = (384, 384)
    antialias: bool = True  # of the bilinear resizing; the published code has none
    # share of a query's height that is cut off at the top and at the bottom
    query_cut: float = Field(0, ge=0, lt=0.5)
    # panoramas. known: turned by heading_deg so that the centre column shows north; random: turned
    # by a random angle
    query_heading: Literal["as_is", "known", "random"] = "as_is"
    # panoramas: the field of view that is kept, around the centre column. One number: queries are
    # cropped to it. A range, as [70, 360]: each query's is drawn from it (training: in each epoch
    # anew), and what is outside is black, so that the encoder's input keeps its size
    query_fov_deg: FieldOfView = 360
    # fail: the run stops; skip: the image is left out, counted, and listed in the run folder
    on_bad_image: Literal["fail", "skip"] = "fail"

    @field_validator("query_fov_deg", mode="before")
    @classmethod
    def _read_fov(cls, value: Any) -> FieldOfView:
        ends = value if isinstance(value, list | tuple) else [value]
        for end in ends:
            is_number = isinstance(end, int | float) and not isinstance(end, bool)
            if not is_number or not 0 < end <= 360 or len(ends) > 2:
                raise ValueError(
                    f"{value!r} is no field of view: give degrees above 0 and up to 360, or a range"
                    " of them, as [70, 360]"
                )
        if len(ends) == 1 and ends is not value:
            return float(value)
        if len(ends) != 2 or ends[0] > ends[1]:
            raise ValueError(f"{value!r} is no range of two rising values, as [70, 360]")
        return float(ends[0]), float(ends[1])

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.cache_dir is not None and not self.cache_dir.startswith("/"):
            raise ValueError(
                f"cache_dir={self.cache_dir!r} is no absolute local path; each node needs its own"
                " folder, such as /var/tmp"
            )
        for name in ("query_size", "reference_size"):
            if min(getattr(self, name)) < 8:
                raise ValueError(f"{name}={list(getattr(self, name))} is below 8 pixels")
        narrowest = self.fov_range[0]
        if self.visible_columns(narrowest) < 8:
            raise ValueError(
                f"query_fov_deg={narrowest:g} leaves {self.visible_columns(narrowest)} pixels of"
                " width, below 8; raise it, or the width of query_size"
            )
        return self

    @property
    def image_options(self) -> ImageOptions:
        """Return the values that are given anew for the images of the data set."""
        return ImageOptions(self.images_root, self.stretch, self.bands)

    @property
    def visible_query_size(self) -> Size:
        """Return the encoder's input size of a query: query_size within the field of view.

        It is query_size where query_fov_deg is a range.
        """
        if isinstance(self.query_fov_deg, tuple):
            return self.query_size
        return self.query_size[0], self.visible_columns(self.query_fov_deg)

    @property
    def fov_range(self) -> tuple[float, float]:
        """Return the narrowest and the widest field of view in degrees."""
        if isinstance(self.query_fov_deg, tuple):
            return self.query_fov_deg
        return self.query_fov_deg, self.query_fov_deg

    def visible_columns(self, fov_deg: float) -> int:
        """Return how many of a query's columns a field of view shows."""
        return round(self.query_size[1] * fov_deg / 360)

    def with_fov(self, fov_deg: float) -> FieldOfView:
        """Return query_fov_deg for one field of view, seen as queries were in training.

        What is outside stays black where query_fov_deg is a range.
        """
        return (fov_deg, fov_deg) if isinstance(self.query_fov_deg, tuple) else fov_deg


def format_fov(fov: FieldOfView) -> str:
    """Return a field of view as text: `90`, or `70-360` for a range."""
    low, high = fov if isinstance(fov, tuple) else (fov, fov)
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


class AugmentConfig(Section):
    """Training augmentation (Sample4Geo, supplementary; FIELD values as defaults).

    Probabilities are per image; those of flip and rotation are per pair.
    """

    # the published form of flips, colours, blur, sharpening and dropout; none: only with
    # protocol=paper. Queries count as ground images but where rotate is planar, reference or query
    published: bool | None = None
    jpeg_probability: Probability = Field(0.5, ge=0, le=1)
    jpeg_quality: tuple[int, int] = (90, 100)
    color_probability: Probability = Field(0.5, ge=0, le=1)
    color_strength: float = Field(0.15, ge=0, le=0.5)  # brightness, contrast, saturation, hue
    blur_probability: Probability = Field(0.3, ge=0, le=1)  # blur or sharpen, one of the two
    dropout_probability: Probability = Field(0.3, ge=0, le=1)  # grid or coarse, one of the two
    flip_probability: Probability = Field(0.5, ge=0, le=1)  # both views of a pair together
    rotate_probability: Probability = Field(0.75, ge=0, le=1)
    # rotation by k * 90 degrees, k in 1..3. panorama: the reference turns, and the query's columns
    # roll with it; planar: both turn; reference, query: that view alone (where the orientation of
    # the other is unknown)
    rotate: Literal["none", "panorama", "planar", "reference", "query"] = "none"
    # overhead queries. The centre of a training query is shifted by up to this share of its side,
    # along each axis; ground beyond the picture is mirrored
    query_shift: float = Field(0.0, ge=0, le=0.5)
    # overhead queries, [smallest, largest]: side of what is kept of a training query, over the
    # picture's side
    query_scale: tuple[float, float] = (1.0, 1.0)
    # where images are augmented. cpu: as they are loaded; device: a batch at a time on the device
    # that trains, with the same random draws, and JPEG compression simulated after the resizing;
    # auto: device where that is a GPU and the form is not the published one
    device: Literal["auto", "cpu", "device"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.jpeg_quality
        if not 1 <= low <= high <= 100:
            raise ValueError(f"jpeg_quality={[low, high]} must be two rising values within 1..100")
        smallest, largest = self.query_scale
        if not 0.25 <= smallest <= largest <= 2:
            raise ValueError(
                f"query_scale={[smallest, largest]} must be two rising values within 0.25..2"
            )
        return self

    @property
    def shifts_queries(self) -> bool:
        """Return whether training queries are shifted or scaled."""
        return self.query_shift > 0 or self.query_scale != (1.0, 1.0)

    def is_on_device(self, device_type: str) -> bool:
        """Return whether images are augmented on a device of the type `cpu`, `cuda` or another.

        Of RunConfig.augmentation: there `published` is known, which compresses before it resizes.
        """
        if self.device == "auto":
            return device_type != "cpu" and not self.published
        return self.device == "device"
