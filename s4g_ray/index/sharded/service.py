"""Serve versions of an index over the references, divided among Ray actors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Self

from numpy.typing import NDArray

from s4g_ray.arrays import Floats32, Floats64, Ints
from s4g_ray.config.schema import MiningConfig
from s4g_ray.data.area import Area
from s4g_ray.errors import RunError
from s4g_ray.index.plan import IndexPlan
from s4g_ray.index.recall import matches_config
from s4g_ray.index.sharded.build import BuildInput, VersionBuild
from s4g_ray.index.sharded.client import IndexClient, PartialResult
from s4g_ray.index.sharded.merging import SearchEffort
from s4g_ray.index.sharded.planning import plan_shards
from s4g_ray.index.sharded.report import IndexReport
from s4g_ray.index.sharded.requests import Coordinates
from s4g_ray.index.sharded.shard_group import ShardGroup
from s4g_ray.index.sharded.sharding import fingerprint_ids
from s4g_ray.index.sharded.update import VersionUpdate
from s4g_ray.index.sharded.versions import version_folder
from s4g_ray.index.top_k import Found
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Stamp, is_published, open_published


class IndexService:
    """The shards and the version that they serve from `folder`; a context manager stops them.

    The newest published version is in memory; a shard that dies is started again and loads it.
    num_vectors, dim and num_queries (of a round; None: as many): the index to plan shards and their
    memory for; None: the newest version. Kind, bits and number of shards that the configuration
    leaves open are those of the newest version, else chosen from what Ray has free. `engine`: the
    engine of exact search that an earlier start chose; it is then not measured again.
    num_indexes: services that still have to start on the same nodes, this one among them.
    swaps: False where one version is built and no other replaces it: shards ask for less memory.

    Raises RunError when nothing fits on the nodes, and when the shards find no room within
    start_timeout_s; reading their files afterwards may take longer.
    """

    def __init__(
        self,
        cfg: MiningConfig,
        folder: str,
        *,
        num_vectors: int | None = None,
        dim: int | None = None,
        num_queries: int | None = None,
        engine: str | None = None,
        num_indexes: int = 1,
        swaps: bool = True,
        start_timeout_s: float = 120.0,
    ) -> None:
        self._cfg = cfg
        self._folder = files.absolute(folder)
        configured = None if cfg.exact_engine == "auto" else cfg.exact_engine
        self._engine = engine or configured
        self.plan = plan_shards(
            cfg, self._folder, num_vectors, dim, num_queries, num_indexes, swaps=swaps
        )
        num_shards = self.plan.num_shards if self.plan is not None else cfg.least_shards
        memory_gb = self.plan.peak_gb if self.plan is not None else 0.0
        self._shards = ShardGroup(cfg, self._folder, num_shards, memory_gb, start_timeout_s)

    @property
    def client(self) -> IndexClient:
        """The client that searches the shards from any process of the cluster."""
        return self._shards.client

    @property
    def engine(self) -> str | None:
        """The engine of exact search; None until a first build has measured it."""
        return self._engine

    def search(
        self,
        version: int,
        queries: Floats32,
        k: int,
        *,
        ids: Ints | None = None,
        area: Area | None = None,
    ) -> Found:
        """Search as IndexClient.search does."""
        return self.client.search(version, queries, k, ids=ids, area=area)

    def search_partial(
        self,
        version: int,
        queries: Floats32,
        k: int,
        *,
        ids: Ints | None = None,
        area: Area | None = None,
        timeout_s: float = 60.0,
    ) -> PartialResult:
        """Search as IndexClient.search_partial does."""
        return self.client.search_partial(
            version, queries, k, ids=ids, area=area, timeout_s=timeout_s
        )

    def is_alive(self) -> bool:
        """Return whether all shards answer; False where one is lost, or still starting again."""
        return self.client.is_alive()

    def effort_taken(self, version: int) -> SearchEffort:
        """Return the search effort that queries of a version took, as the first shard counts it.

        All shards search at the same effort. Counts from the last start of that shard.
        """
        effort: SearchEffort = self._shards.ask_first("effort_taken", version)
        return effort

    def report(
        self, version: int, *, stamp: Stamp | None = None, ids: Ints | None = None
    ) -> IndexReport | None:
        """Return how a version was built, and adopt its engine where none is chosen yet.

        Returns None when the version is not in service on every shard, was not made from `stamp`,
        was not built of exactly `ids`, needs more memory than was reserved, or is not what the
        configuration asks for now.
        """
        if any(served != version for served in self._shards.broadcast("served_version")):
            return None
        manifest = open_published(version_folder(self._folder, version), "index")
        if stamp is not None and manifest.stamp != stamp:
            return None
        if ids is not None and manifest.info.get("ids_sha256") != fingerprint_ids(ids):
            return None
        if self.plan is not None:
            built = IndexPlan(**manifest.info["plan"])
            if built.shard_gb > self.plan.shard_gb:
                return None
        if not matches_config(manifest.info, self._cfg):
            return None
        report = IndexReport.from_info(manifest.info)
        self._engine = self._engine or report.engine
        return report

    def build(
        self,
        version: int,
        embeddings: str | Sequence[str],
        ids: Ints | None = None,
        *,
        sample: Floats32 | None = None,
        regions: NDArray[Any] | None = None,
        coordinates: Coordinates | None = None,
        k: int,
        stamp: Stamp | None = None,
    ) -> IndexReport:
        """Index the references of published embedding tables as a version and put it in service.

        ids: the references to index; None: all. sample[S, D]: queries, drawn uniformly, on which
        recall@k is measured against exact search over the same embeddings; the search effort is
        raised until recall@k reaches mining.min_recall, unless the configuration sets it.
        regions[S]: the names of their regions. coordinates: of all references; a search can then be
        restricted to an area. The version before is in service until all shards serve this one. A
        version of the same number, and later ones, go out of service once the rows of the new one
        are counted and checked.

        Raises RunError for tables, ids or k that do not fit each other or the memory budget, for
        recall below mining.min_recall, and for a shard that fails; the version before is then in
        service.
        """
        tables = [embeddings] if isinstance(embeddings, str) else list(embeddings)
        given = BuildInput(tables, ids, sample, regions, coordinates, k, stamp)
        build = VersionBuild(self._cfg, self._folder, self._shards, version, self._engine)
        try:
            return self._attempt(version, lambda: build.run(given, self.plan))
        finally:
            self._engine = build.engine

    def add(
        self,
        version: int,
        vectors: NDArray[Any],
        ids: Ints,
        coordinates: Floats64 | None = None,
    ) -> IndexReport:
        """Publish a version with vectors[n, D] more than the newest, under ids[n] that are new.

        coordinates[n, 2]: lat, lon, where the index has them. The version before is in service
        until all shards serve this one, as in replace and remove. An exact kind then answers as one
        that was built of all vectors; an approximate one keeps its cells, and its recall is not
        measured. Raises RunError for vectors and ids that do not fit, and for a shard that fails;
        the version before is then in service.
        """
        return self._attempt(version, lambda: self._update(version).add(vectors, ids, coordinates))

    def replace(
        self,
        version: int,
        vectors: NDArray[Any],
        ids: Ints,
        coordinates: Floats64 | None = None,
    ) -> IndexReport:
        """Publish a version with other vectors[n, D] for ids[n] of the newest."""
        return self._attempt(
            version, lambda: self._update(version).replace(vectors, ids, coordinates)
        )

    def remove(self, version: int, ids: Ints) -> IndexReport:
        """Publish a version without ids[n] of the newest."""
        return self._attempt(version, lambda: self._update(version).remove(ids))

    def _update(self, version: int) -> VersionUpdate:
        return VersionUpdate(self._folder, self._shards, version)

    def _attempt(self, version: int, make: Callable[[], IndexReport]) -> IndexReport:
        """Make a version; where that fails, drop what was staged and written of it."""
        try:
            return make()
        except Exception:
            # a dead shard raises here too; the error of the build is the one to report
            with suppress(RunError):
                self._shards.broadcast("return_to_newest")
            folder = version_folder(self._folder, version)
            if not is_published(folder):
                files.remove(folder)
            raise

    def stop(self) -> None:
        """Stop the shards."""
        self._shards.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
