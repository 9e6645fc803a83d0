"""The index service: versions of an index over the references, sharded over Ray actors; its client and its builds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Self

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.config.schema import MiningConfig
from s4g_ray.distributed.actors import kill
from s4g_ray.errors import RunError
from s4g_ray.index.recall import is_as_asked
from s4g_ray.index.sharded.build import IndexReport, VersionBuild
from s4g_ray.index.sharded.client import IndexClient, PartialResult
from s4g_ray.index.sharded.shard import version_folder
from s4g_ray.index.sharded.shard_group import ShardGroup
from s4g_ray.index.sharded.sharding import Found
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Stamp, is_published, open_published


class IndexService:
    """The shards and the versions that they serve from `folder`; a context manager that stops them.

    A shard that dies is started again and loads what is published. `engine` is that of exact search where an
    earlier start chose it: then it is not measured again. Raises RunError for shards that find no room within
    start_timeout_s; what they read afterwards may take longer.
    """

    def __init__(
        self,
        cfg: MiningConfig,
        folder: str,
        *,
        engine: str | None = None,
        start_timeout_s: float = 120.0,
    ) -> None:
        self._cfg, self._folder = cfg, files.absolute(folder)
        self._engine = engine or (None if cfg.exact_engine == "auto" else cfg.exact_engine)
        self._shards = ShardGroup(cfg, self._folder, start_timeout_s)

    @property
    def client(self) -> IndexClient:
        """What asks the shards, from any process of the cluster."""
        return self._shards.client

    @property
    def engine(self) -> str | None:
        """The engine of exact search; none until a first build has measured it."""
        return self._engine

    def search(self, version: int, queries: Floats32, k: int) -> Found:
        """As IndexClient.search."""
        return self.client.search(version, queries, k)

    def search_partial(
        self, version: int, queries: Floats32, k: int, *, timeout_s: float = 60.0
    ) -> PartialResult:
        """As IndexClient.search_partial."""
        return self.client.search_partial(version, queries, k, timeout_s=timeout_s)

    def report(self, version: int, *, stamp: Stamp | None = None) -> IndexReport | None:
        """How a version was built; None when it is not in service on every shard, or not from `stamp` or as asked now.

        The engine of exact search is taken from it where none is chosen yet.
        """
        folder = version_folder(self._folder, version)
        if not all(version in serving for serving in self._shards.same("versions")):
            return None
        manifest = open_published(folder, "index")
        if (stamp is not None and manifest.stamp != stamp) or not is_as_asked(
            manifest.info, self._cfg
        ):
            return None
        report = IndexReport(
            **{field.name: manifest.info[field.name] for field in fields(IndexReport)}
        )
        self._engine = self._engine or report.engine
        return report

    def build(
        self,
        version: int,
        embeddings: str | Sequence[str],
        ids: Ints | None = None,
        *,
        sample: Floats32 | None = None,
        k: int,
        stamp: Stamp | None = None,
    ) -> IndexReport:
        """Index the references of published embedding tables beside what is in service, then put that in service.

        ids: the references to index; none: all. sample[S, D]: queries that recall@k is measured on against exact
        search over the same embeddings; effort is raised until it reaches mining.min_recall, unless it is set.
        This version and the highest other ones stay, VERSIONS_KEPT in all. Raises RunError, with all versions in
        service as before, for tables, ids and k that do not fit each other or the budget of memory, for recall below
        mining.min_recall, and for a shard that fails. A version that is there already goes out of service once the
        rows of the new one are counted and checked.
        """
        tables = [embeddings] if isinstance(embeddings, str) else list(embeddings)
        build = VersionBuild(self._cfg, self._folder, self._shards, version, self._engine)
        try:
            return build.run(tables, ids, sample, k, stamp)
        except Exception:
            with suppress(RunError):  # of a shard that is dead; why the build failed is what counts
                self._shards.same("discard")
            if not is_published(version_folder(self._folder, version)):
                files.remove(version_folder(self._folder, version))
            raise
        finally:
            self._engine = build.engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        kill(self.client.shards)
