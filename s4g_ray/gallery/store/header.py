"""Define GalleryHeader: gallery.json, which describes a gallery and names its current version."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from s4g_ray.data.format.image_paths import find_root
from s4g_ray.errors import InputError, RunError
from s4g_ray.storage import files
from s4g_ray.storage.store_errors import reraise_outage

FORMAT = "s4g-gallery"
FORMAT_VERSION = 1
HEADER = "gallery.json"
MODEL = "model"  # the folder of the encoder: an export that is a published checkpoint too
CALIBRATION = "calibration.json"
IMAGES = "images"


@dataclass(frozen=True)
class GalleryHeader:
    """The content of gallery.json. Written as a whole, after all that it names."""

    name: str
    current: int  # the version that answers
    model: dict[str, Any]  # architecture, weights_sha256, preprocessing, step
    numerics: dict[str, Any]  # of encoder.precision.Numerics
    dim: int
    dtype: str  # of the embeddings
    num_tiles: int
    index: dict[str, Any]  # of IndexFacts.summary
    copies_images: bool
    sources: tuple[dict[str, Any], ...]  # name, uri, fingerprint and tiles of each data set
    created: str  # ISO 8601, UTC
    updated: str
    attribution: str = ""
    # of section mining, as they were asked for: a gallery that is planned anew keeps them
    index_settings: dict[str, Any] = field(default_factory=dict)
    # the folder that relative paths of images start from: relative to the gallery, or absolute;
    # None: the gallery's own
    images_root: str | None = None

    def find_images(self, gallery: str) -> str:
        """Return the absolute folder that relative paths of images start from."""
        return find_root(gallery, self.images_root)

    def save(self, gallery: str) -> None:
        """Write gallery.json: from then on readers open this version."""
        value = {"format": FORMAT, "version": FORMAT_VERSION, **dataclasses.asdict(self)}
        files.write_json(files.join(gallery, HEADER), value)

    @classmethod
    def load(cls, gallery: str) -> GalleryHeader:
        """Read gallery.json. Raises InputError for a folder that is no gallery."""
        uri = files.join(gallery, HEADER)
        try:
            value = files.read_json(uri)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(
                f"{gallery} is no gallery: {HEADER} is missing; make one with `s4g gallery build`"
            ) from error
        except RunError as error:
            reraise_outage(error)
            raise InputError(str(error)) from error
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise InputError(f"{uri} is not of format {FORMAT!r}")
        if value.get("version") != FORMAT_VERSION:
            raise InputError(
                f"{uri} is of version {value.get('version')!r} of its format; this release of"
                f" s4g-ray reads version {FORMAT_VERSION}: build the gallery again"
            )
        names = {field.name for field in dataclasses.fields(cls)}
        entries = {key: item for key, item in value.items() if key in names}
        try:
            return cls(**{**entries, "sources": tuple(value["sources"])})
        except (KeyError, TypeError) as error:
            raise InputError(f"{uri} lacks entries ({error}); build the gallery again") from error
