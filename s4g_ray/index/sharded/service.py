"""Serve versions of an index over the references, divided among Ray actors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Self

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.config.schema import MiningConfig
from s4g_ray.distributed.actors import kill
from s4g_ray.errors import RunError
from s4g_ray.index.recall import matches_config
from s4g_ray.index.sharded.build import IndexReport, VersionBuild
from s4g_ray.index.sharded.client import IndexClient, PartialResult
from s4g_ray.index.sharded.shard import version_folder
from s4g_ray.index.sharded.shard_group import ShardGroup
from s4g_ray.index.top_k import Found
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Stamp, is_published, open_published


class IndexService:
    """The shards and the versions that they serve from `folder`; a context manager stops them.

    A shard that dies is started again and loads all published versions. `engine`: the engine of
    exact search that an earlier start chose; it is then not measured again. Raises RunError when
    the shards find no room within start_timeout_s; reading their files afterwards may take longer.
    """

    def __init__(
        self,
        cfg: MiningConfig,
        folder: str,
        *,
        engine: str | None = None,
        start_timeout_s: float = 120.0,
    ) -> None:
        self._cfg = cfg
        self._folder = files.absolute(folder)
        configured = None if cfg.exact_engine == "auto" else cfg.exact_engine
        self._engine = engine or configured
        self._shards = ShardGroup(cfg, self._folder, start_timeout_s)

    @property
    def client(self) -> IndexClient:
        """The client that searches the shards from any process of the cluster."""
        return self._shards.client

    @property
    def engine(self) -> str | None:
        """The engine of exact search; None until a first build has measured it."""
        return self._engine

    def search(self, version: int, queries: Floats32, k: int) -> Found:
        """Search as IndexClient.search does."""
        return self.client.search(version, queries, k)

    def search_partial(
        self, version: int, queries: Floats32, k: int, *, timeout_s: float = 60.0
    ) -> PartialResult:
        """Search as IndexClient.search_partial does."""
        return self.client.search_partial(version, queries, k, timeout_s=timeout_s)

    def report(self, version: int, *, stamp: Stamp | None = None) -> IndexReport | None:
        """Return how a version was built, and adopt its engine where none is chosen yet.

        Returns None when the version is not in service on every shard, was not made from `stamp`,
        or is not what the configuration asks for now.
        """
        if not all(version in serving for serving in self._shards.broadcast("versions")):
            return None
        manifest = open_published(version_folder(self._folder, version), "index")
        if stamp is not None and manifest.stamp != stamp:
            return None
        if not matches_config(manifest.info, self._cfg):
            return None
        names = [field.name for field in fields(IndexReport)]
        report = IndexReport(**{name: manifest.info[name] for name in names})
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
        """Index the references of published embedding tables as a version and put it in service.

        ids: the references to index; None: all. sample[S, D]: queries on which recall@k is
        measured against exact search over the same embeddings; the search effort is raised until
        recall@k reaches mining.min_recall, unless the configuration sets it. This version and the
        highest others stay in service, VERSIONS_KEPT in all. A version of the same number goes out
        of service once the rows of the new one are counted and checked.

        Raises RunError for tables, ids or k that do not fit each other or the memory budget, for
        recall below mining.min_recall, and for a shard that fails; all versions are then in
        service as before.
        """
        tables = [embeddings] if isinstance(embeddings, str) else list(embeddings)
        build = VersionBuild(self._cfg, self._folder, self._shards, version, self._engine)
        try:
            return build.run(tables, ids, sample, k, stamp)
        except Exception:
            # a dead shard raises here too; the error of the build is the one to report
            with suppress(RunError):
                self._shards.broadcast("drop_staged")
            folder = version_folder(self._folder, version)
            if not is_published(folder):
                files.remove(folder)
            raise
        finally:
            self._engine = build.engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        kill(self.client.shards)
