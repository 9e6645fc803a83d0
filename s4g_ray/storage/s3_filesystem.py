"""Extend s3fs with one retry rule for all requests, and with as few requests as possible.

s3fs and botocore each retry by their own rules. The numbers of their attempts multiply, and neither
retries an answer that ends early or the keys that a bulk delete refuses. Here both try once, and
s3_retries.py decides on each request, including the reading of its answer.
"""

from __future__ import annotations

import asyncio
import math
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

PIECE = 64 << 20  # bytes: larger objects are read and written in pieces, each retried by itself
PIECES_AT_ONCE = 8  # of one object
READS = 4  # attempts to read an object that is replaced while its pieces are read
KEYS_AT_ONCE = 1000  # S3's limit for a bulk delete
# a connection that fails, or an answer that ends early or does not match its checksum
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
# process id and variables -> file system
_filesystems: dict[tuple[int, frozenset[tuple[str, str]]], S3] = {}
_lock = threading.Lock()


def s3_filesystem() -> S3:
    """Return this process's file system for its environment variables, shared by all threads.

    A forked process gets its own. Raises InputError for an invalid endpoint or number in the
    environment.
    """
    variables = set()
    for name in list(os.environ):
        value = os.environ.get(name)  # None when another thread has removed it since
        if name.startswith(("AWS_", "S4G_S3_")) and value is not None:
            variables.add((name, value))
    key = os.getpid(), frozenset(variables)
    with _lock:
        if key not in _filesystems:
            check_endpoint()
            _filesystems[key] = S3.from_policy(RetryPolicy.read())
        return _filesystems[key]


os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock()))


class S3(s3fs.S3FileSystem):  # type: ignore[misc]
    """s3fs with requests that are retried until they succeed or their attempts are used up.

    The final error names bucket and key.
    """

    policy: RetryPolicy

    @classmethod
    def from_policy(cls, policy: RetryPolicy) -> S3:
        """Make a file system of the credentials, endpoint and region that AWS's standards give."""
        filesystem = cls(
            use_listings_cache=False,  # other processes publish too
            default_cache_type="none",  # byte ranges need no reading ahead
            skip_instance_cache=True,  # s3fs would make one a thread, each with its connections
            config_kwargs={
                "retries": {"total_max_attempts": 1, "mode": "standard"},
                "connect_timeout": policy.timeout_s,
                "read_timeout": policy.timeout_s,
                "max_pool_connections": policy.max_connections,
            },
        )
        filesystem.policy = policy
        filesystem.batch_size = policy.max_connections  # of cat_ranges
        return filesystem

    def __reduce__(self) -> tuple[Callable[[], S3], tuple[()]]:
        """Unpickle to the file system of the other process, made of its own environment."""
        return s3_filesystem, ()

    async def _persist(
        self, operation: str, where: dict[str, Any], request: Callable[[], Awaitable[Any]]
    ) -> Any:
        """Repeat a request until it succeeds. Raises FileNotFoundError and StoreError."""
        for attempt in range(1, self.policy.max_attempts + 1):
            try:
                return await request()
            except (boto.BotoCoreError, boto.ClientError, aiohttp.ClientError, OSError) as error:
                may_pass = isinstance(error, CUT) or is_retryable(error)
                if not may_pass or attempt == self.policy.max_attempts:
                    raise permanent_error(error, _uri_of(where), operation, attempt) from error
            await asyncio.sleep(wait_before(attempt))
        raise AssertionError("unreachable")

    async def _call_s3(self, method: str, *more: Any, **arguments: Any) -> Any:
        """Call a method of the client by its name, with retries."""

        async def request() -> Any:
            client = await self.set_session()
            call = getattr(client, method)
            return await call(**self._get_s3_method_kwargs(call, *more, **arguments))

        return await self._persist(method, arguments, request)

    async def get_range(
        self, bucket: str, key: str, first: int, end: int | None, **more: str
    ) -> tuple[bytes, int, str]:
        """Return bytes from `first` up to `end` (None: all), the object's length, and its ETag.

        Returns fewer bytes, and no error, when the range ends past the object's end.
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
            where = {"Bucket": bucket, "Key": key}
            found: tuple[bytes, int, str] = await self._persist("get_object", where, request)
            return found
        except StoreError as error:
            if code_of(error.__cause__) in ("InvalidRange", "416"):
                return b"", 0, ""
            raise

    async def _cat_file(
        self, path: str, *_: Any, start: int | None = None, end: int | None = None, **__: Any
    ) -> bytes:
        """Read a range of an object, or all of it.

        Needs no request for the length: the answer to the first piece of a large object holds it.
        """
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
        """Read all pieces of one version of an object.

        Raises StoreError when the object is replaced between two pieces.
        """
        piece_end = first + PIECE
        data, total, etag = await self.get_range(
            bucket, key, first, min(end or piece_end, piece_end)
        )
        end = min(end or total, total)
        if first + len(data) >= end:
            return data
        pieces = await self._run_pieces(
            self.get_range(bucket, key, start, min(start + PIECE, end), IfMatch=etag)
            for start in range(piece_end, end, PIECE)
        )
        return b"".join([data, *(piece for piece, _, _ in pieces)])

    async def _pipe_file(self, path: str, data: bytes, **_: Any) -> None:
        await self._write(path, len(data), lambda first: data[first : first + PIECE])

    async def _put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        with Path(lpath).open("rb") as file:
            descriptor = file.fileno()
            size = os.fstat(descriptor).st_size
            await self._write(rpath, size, lambda first: os.pread(descriptor, PIECE, first))

    async def _write(self, path: str, size: int, read: Callable[[int], bytes]) -> None:
        """Write an object that becomes visible when it is whole.

        An object larger than PIECE is a multipart upload, which is completed last or aborted.
        `read(first)` returns the piece that begins at byte `first`.
        """
        bucket, key, _ = self.split_path(path)
        where = {"Bucket": bucket, "Key": key}
        if size <= PIECE:
            await self._call_s3("put_object", Body=read(0), **where)
            return
        try:
            await self._upload(where, size, read)
        except FileNotFoundError:  # the upload is gone: stores drop old uploads
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
            num_pieces = math.ceil(size / PIECE)
            parts = await self._run_pieces(put(number) for number in range(1, num_pieces + 1))
            tags = [
                {"PartNumber": number, "ETag": part["ETag"]} for number, part in enumerate(parts, 1)
            ]
            try:
                await self._call_s3(
                    "complete_multipart_upload", **upload, MultipartUpload={"Parts": tags}
                )
            except OSError:  # the upload may be complete, and only the answer lost
                if not await self._has_mark(where, mark):
                    raise
        except BaseException:
            with suppress(Exception):  # the first error is the one to raise
                await self._call_s3("abort_multipart_upload", **upload)
            raise

    async def _has_mark(self, where: dict[str, str], mark: dict[str, str]) -> bool:
        """Return whether an object is the one that was uploaded with this mark."""
        with suppress(OSError):
            answer = await self._call_s3("head_object", **where)
            return bool(answer["Metadata"] == mark)
        return False

    async def _run_pieces(self, requests: Iterator[Awaitable[Any]]) -> list[Any]:
        """Make the requests of an object's pieces, PIECES_AT_ONCE of them at a time.

        Returns the results in order. After a failure it starts no more requests, waits for those
        that run, and raises the first error.
        """
        waiting = enumerate(requests)
        found: dict[int, Any] = {}
        errors: list[Exception] = []

        async def work() -> None:
            for number, request in waiting:
                try:
                    found[number] = await request
                except Exception as error:
                    errors.append(error)
                if errors:
                    return

        num_at_once = min(PIECES_AT_ONCE, self.policy.max_connections)
        await asyncio.gather(*(work() for _ in range(num_at_once)))
        if errors:
            raise errors[0]
        return [found[number] for number in sorted(found)]

    async def _isfile(self, path: str) -> bool:
        """Return whether an object exists, by one request."""
        bucket, key, _ = self.split_path(path)
        try:
            await self._call_s3("head_object", Bucket=bucket, Key=key)
        except FileNotFoundError:
            return False
        return True

    async def _ls(self, path: str, detail: bool = False, **_: Any) -> list[Any]:
        """List a folder. Raises FileNotFoundError when it does not exist.

        s3fs would list its parent folder in that case, too.
        """
        path = self._strip_protocol(path)
        found = await self._lsdir(path)
        if not found:
            raise FileNotFoundError(f"s3://{path} is not there")
        return found if detail else sorted(entry["name"] for entry in found)

    async def _rm(self, path: str, recursive: bool = False, **_: Any) -> None:
        """Remove an object and, when `recursive`, all objects below it.

        Does nothing when there are none.
        """
        bucket, key, _ = self.split_path(path)
        keys = [key]
        if recursive:
            pages = self._list_pages("list_objects_v2", Bucket=bucket, Prefix=f"{key}/")
            async for page in pages:
                keys.extend(entry["Key"] for entry in page.get("Contents", []))
        for start in range(0, len(keys), KEYS_AT_ONCE):
            await self._delete_keys(bucket, key, keys[start : start + KEYS_AT_ONCE])

    async def _delete_keys(self, bucket: str, prefix: str, keys: list[str]) -> None:
        """Delete at most KEYS_AT_ONCE objects by one request, which is repeated for any refusal."""
        objects = [{"Key": key} for key in keys]

        async def request() -> None:
            client = await self.set_session()
            answer = await client.delete_objects(
                Bucket=bucket, Delete={"Objects": objects, "Quiet": True}
            )
            errors = answer.get("Errors")
            if errors:  # a repeated request may name keys that are deleted already
                raise boto.ClientError({"Error": errors[0]}, "DeleteObjects")

        await self._persist("delete_objects", {"Bucket": bucket, "Prefix": prefix}, request)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        """Open an object to read pieces of it. Only pipe_file and put_file write objects."""
        assert mode == "rb", mode
        return _File(
            self,
            path,
            mode,
            block_size=self.default_block_size,
            cache_type="none",
            cache_options={},
        )


def _uri_of(where: dict[str, Any]) -> str:
    """Return the URI that a request's arguments name."""
    parts = [str(where[name]) for name in ("Bucket", "Key", "Prefix") if where.get(name)]
    return f"s3://{'/'.join(parts).rstrip('/')}"


class _File(S3File):  # type: ignore[misc]
    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.cat_file(self.path, start=start, end=end)  # type: ignore[no-any-return]
