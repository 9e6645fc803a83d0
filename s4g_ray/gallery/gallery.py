"""Open a gallery: tiles with an index and an encoder, which answer without the run.

Ray is imported only for a gallery whose index is held by shards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.data.area import Area
from s4g_ray.data.format.image_paths import is_whole, resolve
from s4g_ray.data.image_table import View
from s4g_ray.data.images import decode_pixels
from s4g_ray.data.pixels.image_values import ImageValues
from s4g_ray.errors import InputError, RunError
from s4g_ray.gallery.store.header import CALIBRATION, MODEL, GalleryHeader
from s4g_ray.gallery.store.images import describe_bytes, is_copied
from s4g_ray.gallery.store.tiles import TileFiles, Tiles, files_of, read_tiles, tiles_of
from s4g_ray.gallery.store.vectors import load_index, read_vectors
from s4g_ray.gallery.store.versions import Version, open_version
from s4g_ray.index.plan import IndexPlan
from s4g_ray.index.top_k import Found
from s4g_ray.storage import files, s3_settings
from s4g_ray.storage.s3_settings import StorageConfig

if TYPE_CHECKING:  # torch takes seconds to import
    from s4g_ray.config.schema import RunConfig
    from s4g_ray.gallery.answer import Answer
    from s4g_ray.gallery.query_encoder import QueryEncoder

MOVED = "where the images were moved, name their folder with `s4g gallery relocate {} FOLDER`"
MOVED_ABSOLUTE = (
    "where the images were moved, `s4g gallery add {} DATASET`, with its data set as it is now,"
    " renews their paths"
)
OPENED_COLUMNS = ("id", "lat", "lon", "size_m")


class GalleryIndex(Protocol):
    """The index of a version: VectorIndex, or SharedIndex over the shards of a cluster."""

    @property
    def plan(self) -> IndexPlan:
        """Kind and sizes, as they were planned."""

    def __len__(self) -> int:
        """Return the number of tiles."""

    def search(self, queries: Floats32, k: int, *, area: Area | None = None) -> Found:
        """Search queries[M, D] -> ids[M, k], scores[M, k] (cosine), best first."""


@dataclass
class IndexOpener:
    """Opens the index of a version: in this process, or by its shards on a Ray cluster."""

    num_threads: int | None
    address: str | None
    storage: StorageConfig
    start_timeout_s: float
    _disconnect: list[Callable[[], None]] = field(default_factory=list)

    def open(self, version: Version) -> GalleryIndex:
        """Open it. Raises InputError for shards without a cluster, and RunError."""
        if not version.facts.is_sharded:
            return load_index(version.index_folder, self.num_threads)
        from s4g_ray.gallery.store.cluster import connect
        from s4g_ray.index.shared.shared_index import SharedIndex

        if not self._disconnect:
            leave = connect(version.gallery, version.facts, self.address, self.storage)
            self._disconnect.append(leave)
        return SharedIndex.open(
            version.index_folder, version.number, start_timeout_s=self.start_timeout_s
        )

    def close(self, index: GalleryIndex | None) -> None:
        """Leave the shards of an index, if it has some, and the cluster."""
        leave_shards = getattr(index, "close", None)
        if leave_shards is not None:
            leave_shards()
        while self._disconnect:
            self._disconnect.pop()()


@dataclass(frozen=True)
class Snapshot:
    """One version in memory. Searches that began on it finish on it."""

    header: GalleryHeader
    version: Version
    tiles: Tiles
    index: GalleryIndex

    @classmethod
    def load(cls, gallery: str, opener: IndexOpener) -> Snapshot:
        """Read the current version; once more where it was replaced and removed meanwhile."""
        header = GalleryHeader.load(gallery)
        try:
            return cls._load(gallery, header, opener)
        except RunError:
            newer = GalleryHeader.load(gallery)
            if newer.current == header.current:
                raise
            return cls._load(gallery, newer, opener)

    @classmethod
    def _load(cls, gallery: str, header: GalleryHeader, opener: IndexOpener) -> Snapshot:
        version = open_version(gallery, header.current)
        tiles = tiles_of(read_tiles(version.folder, version.parts, OPENED_COLUMNS))
        index = opener.open(version)
        if len(index) != len(tiles):
            raise RunError(
                f"{version.folder} has {len(tiles)} tiles, but {len(index)} in its index; build"
                " the gallery again"
            )
        return cls(header, version, tiles, index)

    @cached_property
    def files(self) -> TileFiles:
        """Return where the images lie, read when first asked for."""
        columns = ("uri", "offset", "length")
        return files_of(read_tiles(self.version.folder, self.version.parts, columns))

    @cached_property
    def segments(self) -> NDArray[np.int32]:
        """Return the version whose embeddings hold each tile, read when first asked for."""
        table = read_tiles(self.version.folder, self.version.parts, ("embedded_in",))
        return np.asarray(table["embedded_in"].to_numpy())


class Gallery:
    """An opened gallery, a context manager. Any number of threads may use it."""

    def __init__(
        self, uri: str, snapshot: Snapshot, device: str | None, opener: IndexOpener
    ) -> None:
        self.uri = uri
        self._snapshot = snapshot
        self._device = device
        self._opener = opener
        self._encoder: QueryEncoder | None = None
        self._lock = threading.Lock()

    @property
    def snapshot(self) -> Snapshot:
        """The version that answers now. Holders of it are not disturbed by reload."""
        return self._snapshot

    @property
    def version(self) -> int:
        """The number of the version that answers."""
        return self._snapshot.version.number

    @property
    def num_tiles(self) -> int:
        """The number of tiles."""
        return len(self._snapshot.tiles)

    @property
    def dim(self) -> int:
        """D of the embeddings."""
        return self._snapshot.header.dim

    @property
    def tiles(self) -> Tiles:
        """The tiles' ids (ascending), positions and sizes."""
        return self._snapshot.tiles

    @property
    def index(self) -> GalleryIndex:
        """The index of the tiles."""
        return self._snapshot.index

    @property
    def has_calibration(self) -> bool:
        """Whether the gallery holds a calibration; asks the store."""
        return files.exists(files.join(self.uri, CALIBRATION))

    @property
    def info(self) -> Mapping[str, Any]:
        """Facts about the gallery, as JSON has them: what `s4g gallery info --json` prints."""
        from s4g_ray.gallery.description import describe_version

        snapshot = self._snapshot
        return describe_version(snapshot.header, snapshot.version, snapshot.tiles)

    @cached_property
    def config(self) -> RunConfig:
        """The configuration of the encoder, of model/model.json: sections `model` and `data`."""
        from s4g_ray.encoder.source import open_source

        return open_source(files.join(self.uri, MODEL), self.uri).config

    def rows(self, ids: Ints) -> Ints:
        """Return the rows of ids[...] in `tiles`. Raises KeyError for an unknown id."""
        return self._snapshot.tiles.rows(ids)

    def search(
        self, queries: Floats32, k: int, *, area: Area | None = None
    ) -> tuple[Ints, Floats32]:
        """Search queries[M, D] -> ids[M, k], scores[M, k] (cosine), best first.

        area: only tiles with their centre in it are found. Id -1 and score -inf follow where fewer
        than k tiles are there. Raises ValueError for queries of another D.
        """
        index = self._snapshot.index
        found, scores = index.search(queries, min(k, len(index)), area=area)
        missing = k - found.shape[1]
        if missing > 0:
            found = np.pad(found, ((0, 0), (0, missing)), constant_values=-1)
            scores = np.pad(scores, ((0, 0), (0, missing)), constant_values=-np.inf)
        return found, scores

    def count_within(self, area: Area) -> int:
        """Return the number of tiles with their centre in an area."""
        tiles = self._snapshot.tiles
        return int(area.contains(tiles.lat, tiles.lon).sum())

    def encode(self, images: Sequence[NDArray[np.uint8]], view: View = "queries") -> Floats32:
        """Embed uint8 images [H, W, 3] of any sizes -> float32 [M, D], each of length 1.

        Images are resized and cropped as evaluation does. Loads the encoder at the first call.
        """
        return self.encoder.encode(images, view)

    @property
    def encoder(self) -> QueryEncoder:
        """The encoder, loaded when first asked for. Raises InputError for another model's."""
        with self._lock:
            if self._encoder is None:
                self._encoder = self._load_encoder()
            return self._encoder

    def _load_encoder(self) -> QueryEncoder:
        from s4g_ray.encoder.precision import Numerics
        from s4g_ray.gallery.query_encoder import QueryEncoder
        from s4g_ray.gallery.store.embedding import GalleryModel

        header = self._snapshot.header
        model = GalleryModel.from_gallery(self.uri, header, self.config)
        numerics = Numerics(**header.numerics)
        return QueryEncoder(self.config, model.checkpoint, numerics, self._device)

    def read_tile_bytes(self, tile_id: int) -> tuple[bytes, str]:
        """Return the file of a tile's image, and its content type.

        Raises KeyError for an unknown id, and RunError for an image that cannot be read.
        """
        snapshot = self._snapshot
        row = int(snapshot.tiles.rows(np.array([tile_id]))[0])
        name = snapshot.files.uris[row]
        if snapshot.header.copies_images and not is_copied(name):
            raise RunError(
                f"{self.uri} holds copies of its images, but the entry of tile {tile_id} names"
                f" {name!r}; build the gallery again"
            )
        uri = resolve(snapshot.header.find_images(self.uri), name)
        length = int(snapshot.files.lengths[row])
        place = (None, None) if length < 0 else (int(snapshot.files.offsets[row]), length)
        try:
            data = files.read_bytes(uri, *place)
        except (OSError, EOFError) as error:
            message = f"the image of tile {tile_id} cannot be read: {error}"
            if not snapshot.header.copies_images:
                remedy = MOVED_ABSOLUTE if is_whole(name) else MOVED
                message += f"; {remedy.format(self.uri)}"
            raise RunError(message) from error
        return data, describe_bytes(data)[1]

    def read_tile(self, tile_id: int) -> NDArray[np.uint8]:
        """Return the pixels of a tile, uint8 [H, W, 3].

        Raises KeyError for an unknown id, and RunError for an image that cannot be read or decoded.
        """
        data, _ = self.read_tile_bytes(tile_id)
        values = ImageValues(self.config.data.stretch, self.config.data.bands)
        try:
            return np.ascontiguousarray(decode_pixels(data, values=values).transpose(1, 2, 0))
        except ValueError as error:
            raise RunError(f"the image of tile {tile_id} cannot be decoded: {error}") from error

    def embedding_of(self, ids: Ints) -> Floats32:
        """Read the embeddings of ids[n] -> float32 [n, D]. Raises KeyError for an unknown id."""
        snapshot = self._snapshot
        wanted = np.asarray(ids, np.int64)
        segments = snapshot.segments[snapshot.tiles.rows(wanted)]
        return read_vectors(self.uri, snapshot.version.segments, segments, wanted, self.dim)

    def locate(self, images: Sequence[Any], **options: Any) -> list[Answer]:
        """Say where photos were taken; options as gallery.locate.locate has them."""
        from s4g_ray.gallery.locate import locate

        answers: list[Answer] = locate(self, images, **options)
        return answers

    def reload(self) -> bool:
        """Open the current version, if it or the folder of images is another; return whether it is.

        Searches of other threads finish on the version that they began with.
        """
        header = GalleryHeader.load(self.uri)
        held = self._snapshot.header
        if (header.current, header.images_root) == (held.current, held.images_root):
            return False
        snapshot = Snapshot.load(self.uri, self._opener)
        with self._lock:
            if snapshot.header.model != self._snapshot.header.model:
                self._encoder = None
                self.__dict__.pop("config", None)
            self._snapshot = snapshot
        return True

    def close(self) -> None:
        """Leave the shards and the cluster that hold the index, if there are any.

        The shards stop with their last user. A closed gallery cannot be searched.
        """
        self._opener.close(self._snapshot.index)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_gallery(
    uri: str,
    *,
    storage: StorageConfig | None = None,
    device: str | None = None,
    num_threads: int | None = None,
    address: str | None = None,
    start_timeout_s: float = 120.0,
) -> Gallery:
    """Open a gallery: a folder or s3://..., as `s4g gallery build` writes it.

    storage: settings of the object store; None: those of the environment. device: of the encoder,
    such as cpu; None: a GPU where there is one. num_threads: of a search in this process.

    A gallery whose index is held by shards takes them from a Ray cluster: that of the process's own
    session, else of `address`, else of RAY_ADDRESS. All processes share one set of shards; the
    first one starts it, and `close` of the last one stops it. start_timeout_s: for shards to start,
    and in a search for one that died to be back.

    Raises InputError for a folder that is no gallery, and where shards are needed and no cluster is
    named; RunError for missing or altered files, and for shards without room.
    """
    if storage is not None:
        s3_settings.apply(storage)
    uri = files.absolute(uri)
    if device is not None and device.partition(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"device {device!r} is none of cpu and cuda")
    opener = IndexOpener(num_threads, address, storage or StorageConfig(), start_timeout_s)
    try:
        snapshot = Snapshot.load(uri, opener)
    except BaseException:
        opener.close(None)
        raise
    return Gallery(uri, snapshot, device, opener)
