"""The object stores of a process as a file system of fsspec: s3://, gs:// and az://.

Its paths are BUCKET/KEY. It serves Arrow and fsspec's own functions, too.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from s4g_ray.errors import RunError
from s4g_ray.storage.object_store import ObjectStore
from s4g_ray.storage.s3_settings import RetryPolicy
from s4g_ray.storage.store_connections import Connections

BLOCK = 8 << 20  # bytes that a file of fsspec reads ahead when it is read in small pieces
VARIABLES = ("AWS_", "S4G_S3_", "GOOGLE_", "AZURE_")
# process id, scheme and variables -> file system
_filesystems: dict[tuple[int, str, frozenset[tuple[str, str]]], StoreFileSystem] = {}
_lock = threading.Lock()


def store_filesystem(scheme: str) -> StoreFileSystem:
    """Return this process's file system for its environment variables, shared by all threads.

    Raises InputError for an invalid number in the environment, and RunError in a process that was
    forked from one that has used a store: the threads of obstore do not survive a fork.
    """
    scheme = "s3" if scheme == "s3a" else scheme
    variables = set()
    for name in list(os.environ):
        value = os.environ.get(name)  # None when another thread has removed it since
        if name.startswith(VARIABLES) and value is not None:
            variables.add((name, value))
    key = os.getpid(), scheme, frozenset(variables)
    with _lock:
        if any(pid != os.getpid() for pid, _, _ in _filesystems):
            raise RunError(
                "this process was forked from one that has used an object store, and cannot use"
                " one; start it by spawn or forkserver"
            )
        if key not in _filesystems:
            _filesystems[key] = StoreFileSystem(scheme, Connections(RetryPolicy.read()))
        return _filesystems[key]


os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock()))


class StoreFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """Buckets of one kind of store; errors are those of ObjectStore."""

    cachable = False  # store_filesystem keeps them

    def __init__(self, scheme: str, connections: Connections) -> None:
        super().__init__(use_listings_cache=False)  # other processes publish too
        self.protocol = scheme
        self._connections = connections
        self._stores: dict[str, ObjectStore] = {}
        self._opening = threading.Lock()

    def __reduce__(self) -> tuple[Callable[[str], StoreFileSystem], tuple[str]]:
        """Unpickle to the file system of the other process, made of its own environment."""
        return store_filesystem, (self.protocol,)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.partition("://")[2].strip("/") if "://" in path else path.strip("/")

    def _locate(self, path: str) -> tuple[ObjectStore, str]:
        bucket, _, key = self._strip_protocol(path).partition("/")
        with self._opening:
            if bucket not in self._stores:
                self._stores[bucket] = ObjectStore(self.protocol, bucket, self._connections)
            return self._stores[bucket], key

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        """Read a range of an object, or all of it."""
        store, key = self._locate(path)
        return store.read(key, start or 0, end)

    def cat_ranges(
        self,
        paths: Sequence[str],
        starts: Sequence[int],
        ends: Sequence[int | None],
        **_: Any,
    ) -> list[Any]:
        """Read ranges at the same time. Returns an error in place of what cannot be read."""

        def read(path: str, start: int, end: int | None) -> bytes | Exception:
            try:
                return self.cat_file(path, start, end)
            except Exception as error:
                return error

        if len(paths) == 1:
            return [read(paths[0], starts[0], ends[0])]
        return list(self._connections.reads.map(read, paths, starts, ends))

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        """Write an object, which becomes visible when it is whole."""
        store, key = self._locate(path)
        store.write(key, value, len(value))

    def pipe_if(self, path: str, value: bytes, version: Any) -> Any:
        """Write an object as ObjectStore.write_if does."""
        store, key = self._locate(path)
        return store.write_if(key, value, version)

    def cat_version(self, path: str) -> tuple[bytes, Any]:
        """Read an object, and its ObjectMeta."""
        store, key = self._locate(path)
        return store.read_version(key)

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        """Write a local file as an object, which becomes visible when it is whole."""
        store, key = self._locate(rpath)
        source = Path(lpath)
        store.write(key, source, source.stat().st_size)

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        """Copy an object, to another bucket too."""
        store, key = self._locate(path1)
        store.copy(key, *self._locate(path2))

    def rm_file(self, path: str) -> None:
        """Remove an object, if it exists."""
        store, key = self._locate(path)
        store.delete([key])

    def rm(self, path: str, recursive: bool = False, **_: Any) -> None:
        """Remove an object and, when `recursive`, all objects below it. Those missing are fine."""
        store, key = self._locate(path)
        if recursive:
            store.delete_folder(key)
        else:
            store.delete([key])

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Describe an object or a folder. Raises FileNotFoundError when there is none."""
        store, key = self._locate(path)
        name = self._strip_protocol(path)
        if key:
            try:
                return _describe(name, store.head(key))
            except FileNotFoundError:
                pass
        if not store.is_folder(key):
            raise FileNotFoundError(f"{self.protocol}://{name} is not there")
        return _describe_folder(name)

    def exists(self, path: str, **_: Any) -> bool:
        """Return whether there is an object or a folder."""
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def isfile(self, path: str) -> bool:
        """Return whether an object exists, by one request."""
        store, key = self._locate(path)
        return store.is_object(key)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """List a folder. Raises FileNotFoundError when it does not exist."""
        store, key = self._locate(path)
        bucket = self._strip_protocol(path).partition("/")[0]
        folders, objects = store.list_folder(key)
        if not folders and not objects:
            raise FileNotFoundError(f"{self.protocol}://{self._strip_protocol(path)} is not there")
        found = [_describe_folder(f"{bucket}/{folder}") for folder in folders]
        found += [_describe(f"{bucket}/{entry['path']}", entry) for entry in objects]
        return found if detail else sorted(entry["name"] for entry in found)

    def find(self, path: str, *_: Any, **__: Any) -> list[str]:
        """Return the sorted paths of an object and of all objects below a folder."""
        store, key = self._locate(path)
        bucket = self._strip_protocol(path).partition("/")[0]
        return sorted(f"{bucket}/{other}" for other in store.find(key))

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        """Open an object to read pieces of it. Only pipe_file and put_file write objects."""
        assert mode == "rb", mode
        return _File(self, path, mode, block_size=BLOCK, cache_type="none", cache_options={})


def _describe(name: str, meta: Any) -> dict[str, Any]:
    return {
        "name": name,
        "type": "file",
        "size": meta["size"],
        "ETag": meta["e_tag"],
        "LastModified": meta["last_modified"],
    }


def _describe_folder(name: str) -> dict[str, Any]:
    return {"name": name, "type": "directory", "size": 0}


class _File(AbstractBufferedFile):  # type: ignore[misc]
    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.cat_file(self.path, start=start, end=end)  # type: ignore[no-any-return]
