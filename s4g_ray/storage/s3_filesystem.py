"""S3 as storage.py uses it: s3fs, with one rule for what is tried again, and no request that nothing needs.

s3fs and botocore each try again by rules of their own, which multiply and leave gaps (an answer that ends early, the
keys that a bulk delete refuses); here both try once, and each request, the reading of its answer included, is tried
again as object_store.py says.
"""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import s3fs
from botocore import exceptions as boto
from s3fs.core import S3File

from s4g_ray.errors import StoreError
from s4g_ray.storage.s3_retries import (
    RetryPolicy,
    code_of,
    is_retryable,
    permanent_error,
    wait_before,
)
from s4g_ray.storage.s3_settings import check_endpoint

PIECE = 64 << 20  # bytes: what is larger is read and written in pieces, each tried again by itself
PIECES_AT_ONCE = 8  # of one object
READS = 4  # of an object that is replaced while its pieces are read
KEYS_AT_ONCE = 1000  # S3's limit for a bulk delete
# a connection that fails, or an answer that ends early or does not fit its checksum
CUT = (
    boto.HTTPClientError,
    boto.ConnectionError,
    boto.IncompleteReadError,
    boto.FlexibleChecksumError,
    boto.ResponseStreamingError,
    aiohttp.ClientError,
    TimeoutError,
    ConnectionError,
)
_made: dict[tuple[int, frozenset[tuple[str, str]]], S3] = {}
_lock = threading.Lock()


def s3_filesystem() -> S3:
    """This process's file system for its environment: one for all threads, made anew in a process that was forked.

    Raises InputError for an endpoint or a number in the environment that is none.
    """
    names = [name for name in os.environ if name.startswith(("AWS_", "S4G_S3_"))]
    # one by one: other threads may remove a variable in the meantime
    found = frozenset(
        (name, value) for name in names if (value := os.environ.get(name)) is not None
    )
    with _lock:
        if (os.getpid(), found) not in _made:
            check_endpoint()
            _made[os.getpid(), found] = S3.from_policy(RetryPolicy.read())
        return _made[os.getpid(), found]


os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock()))


class S3(s3fs.S3FileSystem):  # type: ignore[misc]
    """s3fs, each request tried again until it succeeds, or fails for good with an error that names bucket and key."""

    patience: RetryPolicy

    @classmethod
    def from_policy(cls, patience: RetryPolicy) -> S3:
        """With credentials, endpoint and region from the standard AWS variables and files."""
        filesystem = cls(
            use_listings_cache=False,  # other processes publish too
            default_cache_type="none",  # what is read by ranges is not read ahead
            skip_instance_cache=True,  # s3fs would have one for each thread, with connections of its own
            config_kwargs={
                "retries": {"total_max_attempts": 1, "mode": "standard"},
                "connect_timeout": patience.timeout_s,
                "read_timeout": patience.timeout_s,
                "max_pool_connections": patience.max_connections,
            },
        )
        filesystem.patience = patience
        filesystem.batch_size = patience.max_connections  # of cat_ranges
        return filesystem

    def __reduce__(self) -> tuple[Callable[[], S3], tuple[()]]:
        """Another process has its own, by its own environment."""
        return s3_filesystem, ()

    async def _persist(
        self, operation: str, where: dict[str, Any], request: Callable[[], Awaitable[Any]]
    ) -> Any:
        """Make a request until it succeeds. Raises FileNotFoundError and StoreError."""
        for attempt in range(1, self.patience.max_attempts + 1):
            try:
                return await request()
            except (boto.BotoCoreError, boto.ClientError, aiohttp.ClientError, OSError) as error:
                passing = isinstance(error, CUT) or is_retryable(error)
                if not passing or attempt == self.patience.max_attempts:
                    uri = "/".join(
                        str(where[part]) for part in ("Bucket", "Key", "Prefix") if where.get(part)
                    )
                    raise permanent_error(
                        error, f"s3://{uri.rstrip('/')}", operation, attempt
                    ) from error
            await asyncio.sleep(wait_before(attempt))
        raise AssertionError("unreachable")

    async def _call_s3(self, method: str, *more: Any, **arguments: Any) -> Any:
        """A request of the client, by the name of its method."""

        async def request() -> Any:
            client = await self.set_session()
            call = getattr(client, method)
            return await call(**self._get_s3_method_kwargs(call, *more, **arguments))

        return await self._persist(method, arguments, request)

    async def _get(
        self, bucket: str, key: str, first: int, end: int | None, **more: str
    ) -> tuple[bytes, int, str]:
        """Bytes from `first` until before `end` (None: all), the object's length, and its ETag.

        What lies past the object's end is not given, and no error.
        """
        if first or end is not None:
            more["Range"] = f"bytes={first}-{'' if end is None else end - 1}"

        async def request() -> tuple[bytes, int, str]:
            client = await self.set_session()
            answer = await client.get_object(Bucket=bucket, Key=key, **more)
            async with answer["Body"] as body:
                data = await body.read()
            total = answer.get("ContentRange", f"/{len(data)}").rpartition("/")[2]
            return data, int(total), answer["ETag"]

        try:
            return await self._persist("get_object", {"Bucket": bucket, "Key": key}, request)  # type: ignore[no-any-return]
        except StoreError as error:
            if code_of(error.__cause__) in ("InvalidRange", "416"):
                return b"", 0, ""
            raise

    async def _cat_file(
        self, path: str, *_: Any, start: int | None = None, end: int | None = None, **__: Any
    ) -> bytes:
        """Without asking for the length first: a large object's is told by the answer to the first piece."""
        bucket, key, _ = self.split_path(path)
        first = start or 0
        if end is not None and end <= first:
            return b""
        for _attempt in range(READS):
            try:
                return await self._read(bucket, key, first, end)
            except StoreError as error:
                if code_of(error.__cause__) not in ("PreconditionFailed", "412"):
                    raise
                replaced = error
        raise replaced

    async def _read(self, bucket: str, key: str, first: int, end: int | None) -> bytes:
        """All pieces of one version of an object. Raises StoreError when it is replaced in the meantime."""
        data, total, etag = await self._get(
            bucket, key, first, min(end or first + PIECE, first + PIECE)
        )
        end = min(end or total, total)
        if first + len(data) >= end:
            return data
        rest = range(first + PIECE, end, PIECE)
        pieces = await self._together(
            self._get(bucket, key, at, min(at + PIECE, end), IfMatch=etag) for at in rest
        )
        return b"".join([data, *(piece for piece, _, _ in pieces)])

    async def _pipe_file(self, path: str, data: bytes, **_: Any) -> None:
        await self._write(path, len(data), lambda first: data[first : first + PIECE])

    async def _put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        with Path(lpath).open("rb") as file:
            number = file.fileno()
            await self._write(
                rpath, os.fstat(number).st_size, lambda first: os.pread(number, PIECE, first)
            )

    async def _write(self, path: str, size: int, read: Callable[[int], bytes]) -> None:
        """Visible when it is whole: what is larger than a piece is an upload that is completed last, or given up.

        `read` gives the piece that begins at a byte, when its turn comes.
        """
        bucket, key, _ = self.split_path(path)
        where = {"Bucket": bucket, "Key": key}
        if size <= PIECE:
            await self._call_s3("put_object", Body=read(0), **where)
            return
        try:
            await self._upload(where, size, read)
        except FileNotFoundError:  # the upload is gone: the store gives up those of some age
            await self._upload(where, size, read)

    async def _upload(self, where: dict[str, str], size: int, read: Callable[[int], bytes]) -> None:
        mark = {"s4g-upload": uuid.uuid4().hex}
        begun = await self._call_s3("create_multipart_upload", Metadata=mark, **where)
        upload = {**where, "UploadId": begun["UploadId"]}

        async def put(number: int) -> Any:
            return await self._call_s3(
                "upload_part", **upload, PartNumber=number, Body=read((number - 1) * PIECE)
            )

        try:
            parts = await self._together(put(number) for number in range(1, 1 - (-size // PIECE)))
            tags = [
                {"PartNumber": number, "ETag": part["ETag"]} for number, part in enumerate(parts, 1)
            ]
            try:
                await self._call_s3(
                    "complete_multipart_upload", **upload, MultipartUpload={"Parts": tags}
                )
            except OSError:  # it may be done, and the answer lost on the way
                if not await self._has_mark(where, mark):
                    raise
        except BaseException:
            with suppress(Exception):  # why it failed is what counts
                await self._call_s3("abort_multipart_upload", **upload)
            raise

    async def _has_mark(self, where: dict[str, str], mark: dict[str, str]) -> bool:
        with suppress(OSError):
            return bool((await self._call_s3("head_object", **where))["Metadata"] == mark)
        return False

    async def _together(self, requests: Iterator[Awaitable[Any]]) -> list[Any]:
        """The results of requests of pieces, some at a time, in order.

        After one has failed none is begun; what it failed with is raised once all that were begun have ended.
        """
        waiting, found, errors = enumerate(requests), dict[int, Any](), list[Exception]()

        async def work() -> None:
            for number, request in waiting:
                try:
                    found[number] = await request
                except Exception as error:
                    errors.append(error)
                if errors:
                    return

        await asyncio.gather(
            *(work() for _ in range(min(PIECES_AT_ONCE, self.patience.max_connections)))
        )
        if errors:
            raise errors[0]
        return [found[number] for number in sorted(found)]

    async def _isfile(self, path: str) -> bool:
        """By one request."""
        bucket, key, _ = self.split_path(path)
        try:
            await self._call_s3("head_object", Bucket=bucket, Key=key)
        except FileNotFoundError:
            return False
        return True

    async def _ls(self, path: str, detail: bool = False, **_: Any) -> list[Any]:
        """What lies in a folder; s3fs would list the folder's own folder too, when there is none."""
        path = self._strip_protocol(path)
        found = await self._lsdir(path)
        if not found:
            raise FileNotFoundError(f"s3://{path} is not there")
        return found if detail else sorted(entry["name"] for entry in found)

    async def _rm(self, path: str, recursive: bool = False, **_: Any) -> None:
        """An object and, where asked, all that lies below; nothing when there is nothing."""
        bucket, key, _ = self.split_path(path)
        keys = [key]
        if recursive:
            pages = self._list_pages("list_objects_v2", Bucket=bucket, Prefix=f"{key}/")
            keys += [entry["Key"] async for page in pages for entry in page.get("Contents", [])]
        for at in range(0, len(keys), KEYS_AT_ONCE):
            some = [{"Key": one} for one in keys[at : at + KEYS_AT_ONCE]]
            where = {"Bucket": bucket, "Prefix": key}

            async def request(some: list[dict[str, str]] = some) -> None:
                client = await self.set_session()
                answer = await client.delete_objects(
                    Bucket=bucket, Delete={"Objects": some, "Quiet": True}
                )
                for error in answer.get(
                    "Errors", ()
                ):  # the others are deleted: to ask again does no harm
                    raise boto.ClientError({"Error": error}, "DeleteObjects")

            await self._persist("delete_objects", where, request)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        """A file to read pieces of; whole objects are written by pipe_file alone."""
        assert mode == "rb", mode
        return _File(
            self,
            path,
            mode,
            block_size=self.default_block_size,
            cache_type="none",
            cache_options={},
        )


class _File(S3File):  # type: ignore[misc]
    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.cat_file(self.path, start=start, end=end)  # type: ignore[no-any-return]
