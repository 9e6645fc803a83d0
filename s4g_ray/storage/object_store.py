"""Read, write, list, copy and delete the objects of one bucket, by obstore.

obstore (Rust's object_store) retries refused requests and answers that end early. What it does not
retry is retried here: listings, deletions and beginnings of uploads whose answer ends early, and
temporary errors with a status below 500.
"""

from __future__ import annotations

import itertools
import random
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import obstore
from botocore import exceptions as boto
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import AzureStore, GCSStore, S3Store

from s4g_ray.errors import InputError, StoreError
from s4g_ray.storage.s3_access import S3Access
from s4g_ray.storage.s3_settings import check_endpoint, is_anonymous
from s4g_ray.storage.store_connections import Connections
from s4g_ray.storage.store_errors import (
    ASK_REGION,
    MISSING,
    NoConditionsError,
    RequestError,
    lacks_conditions,
    permanent_error,
)

# Bytes: larger objects are read and written in pieces, each retried by itself. A piece is sent
# within RetryPolicy.timeout_s.
PIECE = 8 << 20
PIECES_AT_ONCE = 8  # of one object
MAX_PIECES = 10_000  # of one object, in S3
MAX_COPY = 5 << 30  # bytes of an object that S3 copies by one request
READS = 4  # attempts to read an object that is replaced while its pieces are read
FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 20.0
LONGEST_RETRIES = timedelta(minutes=10)  # of one signed request: a signature is valid for 15
NO_LIMIT = "1day"  # of a whole request: RetryPolicy.timeout_s limits its pauses
_JITTER = random.SystemRandom()  # clients that were throttled together must not retry together
Result = TypeVar("Result")


def wait_before(attempt: int) -> float:
    """Draw the seconds to wait after a failed attempt, counted from 1.

    The limit of the draw doubles with each attempt, from FIRST_WAIT_S to LONGEST_WAIT_S.
    """
    return _JITTER.uniform(0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - 1)))


class ObjectStore:
    """One bucket (of Azure: container). Errors name bucket and key.

    Methods take keys and raise FileNotFoundError for a missing object, and StoreError.
    """

    def __init__(self, scheme: str, bucket: str, connections: Connections) -> None:
        """Open a bucket; makes no request.

        Raises InputError for an invalid endpoint, and StoreError for credentials that are wrong.
        """
        self._scheme = scheme
        self._bucket = bucket
        self._connections = connections
        self._policy = connections.policy
        self._access: S3Access | None = None
        if scheme == "s3":
            check_endpoint()
        try:
            if scheme == "s3":
                self._access = S3Access.find()
            self._region = self._access.region if self._access else None
            self._store = self._open(self._region)
        except (boto.BotoCoreError, BaseError, ValueError, OSError) as error:
            fault = RequestError.parse(error, "open the bucket")
            raise permanent_error(fault, self._uri("")) from fault

    def _open(self, region: str | None, max_retries: int | None = None) -> Any:
        """Make obstore's store. max_retries: of a request by obstore; None: as configured."""
        if max_retries is None:
            max_retries = self._policy.max_attempts - 1
        timeout = timedelta(seconds=self._policy.timeout_s)
        client: Any = {
            "timeout": NO_LIMIT,
            "connect_timeout": timeout,
            "read_timeout": timeout,
            "pool_max_idle_per_host": str(self._policy.max_connections),
        }
        retries: Any = {
            "max_retries": max_retries,
            "retry_timeout": LONGEST_RETRIES,
            "backoff": {
                "init_backoff": timedelta(seconds=min(FIRST_WAIT_S, LONGEST_WAIT_S)),
                "max_backoff": timedelta(seconds=LONGEST_WAIT_S),
                "base": 2,
            },
        }
        if self._access is None:
            kind: Any = {"gs": GCSStore, "az": AzureStore}[self._scheme]
            client["allow_http"] = True  # only for an address that the user has set
            signing: Any = {"skip_signature": True} if is_anonymous(self._scheme) else {}
            return kind(self._bucket, client_options=client, retry_config=retries, **signing)
        options: Any = {"region": region} if region else {}
        if self._access.endpoint:
            options["endpoint"] = self._access.endpoint
            client["allow_http"] = self._access.endpoint.startswith("http://")
        if self._access.ca_bundle:
            client["root_certificate"] = self._access.ca_bundle
        if self._access.credentials is None:
            options["skip_signature"] = True
        else:
            options["credential_provider"] = self._access.current_credentials
        return S3Store(self._bucket, client_options=client, retry_config=retries, **options)

    def _uri(self, key: str) -> str:
        return f"{self._scheme}://{self._bucket}/{key}".rstrip("/")

    def _request(
        self, operation: str, key: str, request: Callable[[Any], Result], connections: int = 1
    ) -> Result:
        """Make a request of obstore, and repeat it while its error may pass.

        Raises FileNotFoundError and StoreError.
        """
        attempts = 0
        while True:
            try:
                return self._connections.run(request, self._store, connections)
            except (BaseError, OSError) as error:
                fault = RequestError.parse(error, operation)
            except ValueError as error:
                if "Could not parse path" not in str(error):
                    raise
                raise InputError(
                    f"{self._uri(key)} cannot be an object's name ({error}); leave out empty parts,"
                    " '.' and '..' between slashes"
                ) from error
            attempts += fault.attempts
            fault.attempts = attempts
            if fault.code in ASK_REGION and self._move_to_region():
                continue
            if not fault.may_pass or attempts >= self._policy.max_attempts:
                raise permanent_error(fault, self._uri(key)) from fault
            time.sleep(wait_before(attempts))

    def _move_to_region(self) -> bool:
        """Open the bucket again in its own region; return False when this is no other one."""
        region = self._access.find_region(self._bucket) if self._access else None
        if region in (None, self._region):
            return False
        self._region = region
        self._store = self._open(region)
        return True

    def head(self, key: str) -> Any:
        """Return obstore's ObjectMeta of an object."""
        return self._request("head_object", key, lambda store: obstore.head(store, key))

    def list_folder(self, key: str) -> tuple[list[str], list[Any]]:
        """Return the keys of the folders in a folder, and the ObjectMeta of its objects."""
        found: Any = self._request(
            "list_objects_v2",
            key,
            lambda store: obstore.list_with_delimiter(store, key or None),
        )
        # an object with the folder's own key is a marker; consoles of object stores make them
        objects = [entry for entry in found["objects"] if entry["path"] != key]
        return list(found["common_prefixes"]), objects

    def is_object(self, key: str) -> bool:
        """Return whether there is an object of this key, by one request."""
        try:
            self.head(key)
        except FileNotFoundError:
            return False
        return True

    def find(self, key: str) -> list[str]:
        """Return the keys of an object and of all objects below a folder."""
        found = self._list(key)
        # an empty object may be a folder's marker, whose key ends with a slash, unlike its path
        keys = [path for path, entry in found.items() if entry["size"] or self.is_object(path)]
        if key and key not in found and self.is_object(key):
            keys.append(key)
        return keys

    def _list(self, key: str) -> dict[str, Any]:
        """Return the ObjectMeta of all objects below a folder and of its marker, by path."""
        found: dict[str, Any] = {}

        def read_pages(store: Any) -> dict[str, Any]:
            offset = next(reversed(found), None)  # an interrupted listing goes on
            for page in obstore.list(store, key or None, offset=offset, chunk_size=1000):
                found.update((entry["path"], entry) for entry in page)
            return found

        return self._request("list_objects_v2", key, read_pages)

    def is_folder(self, key: str) -> bool:
        """Return whether there are objects below a key."""

        def read_page(store: Any) -> list[Any]:
            return list(next(iter(obstore.list(store, key or None, chunk_size=2)), []))

        found = self._request("list_objects_v2", key, read_page)
        return any(entry["path"] != key for entry in found)

    def read(self, key: str, start: int, end: int | None) -> bytes:
        """Read bytes from `start` up to `end` (None: the object's end), less where it is shorter.

        Needs no request for the length: the answer to the first piece of a large object holds it.
        """
        if end is not None and end <= start:
            return b""
        for attempt in itertools.count(1):
            try:
                return self._read_version(key, start, end)
            except StoreError as error:
                is_replaced = _code_of(error) in ("PreconditionFailed", "PreconditionError", "412")
                if not is_replaced or attempt == READS:
                    raise
        raise AssertionError("unreachable")

    def _read_version(self, key: str, start: int, end: int | None) -> bytes:
        """Read all pieces of one version of an object.

        Raises StoreError when the object is replaced between two pieces.
        """
        piece_end = start + PIECE
        try:
            first, meta = self._get(key, start, min(end or piece_end, piece_end))
        except StoreError as error:
            if _code_of(error) in ("InvalidRange", "416"):  # it starts at the end, or past it
                return b""
            raise
        end = min(end or meta["size"], meta["size"])
        if start + len(first) >= end:
            return first

        def read_piece(at: int) -> bytes:
            return self._get(key, at, min(at + PIECE, end), meta["e_tag"])[0]

        starts = range(piece_end, end, PIECE)
        rest = self._connections.read_pieces(read_piece, starts, PIECES_AT_ONCE)
        return b"".join([first, *rest])

    def _get(self, key: str, start: int, end: int, e_tag: str | None = None) -> tuple[bytes, Any]:
        options: Any = {"range": (start, end)}
        if e_tag:
            options["if_match"] = e_tag

        def request(store: Any) -> tuple[bytes, Any]:
            answer = obstore.get(store, key, options=options)
            return bytes(answer.bytes()), answer.meta

        return self._request("get_object", key, request)

    def write(self, key: str, source: bytes | Path, size: int) -> None:
        """Write an object of `size` bytes, which becomes visible when it is whole.

        An object larger than PIECE is a multipart upload, which is completed last or aborted.
        """
        if size > PIECE:
            self._upload(key, source, size)
            return
        data = source.read_bytes() if isinstance(source, Path) else source
        self._request(
            "put_object",
            key,
            lambda store: obstore.put(store, key, data, use_multipart=False),
        )

    def write_if(self, key: str, data: bytes, version: Any) -> Any:
        """Write a small object where it is of a version still, or (None) where there is none.

        version: `e_tag` and `version` of its ObjectMeta. Returns those of the new object, or None
        where the condition does not hold; an earlier attempt whose answer was lost may be why.
        Raises NoConditionsError for a store that says that it has no conditions.
        """

        def put(_: Any) -> Any:
            try:
                # obstore takes "not implemented" for a failure that may pass, and repeats it
                store = self._open(self._region, max_retries=0)
                mode: Any = "create"
                if version is not None:
                    mode = {name: value for name, value in version.items() if value is not None}
                return obstore.put(store, key, data, use_multipart=False, mode=mode)
            except (AlreadyExistsError, PreconditionError):
                return None
            except BaseError as error:
                if lacks_conditions(error):
                    raise NoConditionsError from error
                raise

        try:
            return self._request("put_object", key, put)
        except FileNotFoundError:  # the object that was to be replaced is gone
            return None

    def read_version(self, key: str) -> tuple[bytes, Any]:
        """Read a small object, and its ObjectMeta, by one request."""

        def request(store: Any) -> tuple[bytes, Any]:
            answer = obstore.get(store, key)
            return bytes(answer.bytes()), answer.meta

        return self._request("get_object", key, request)

    def _upload(self, key: str, source: bytes | Path, size: int) -> None:
        """Upload an object in pieces, again where the store has dropped the upload."""
        num_connections = min(PIECES_AT_ONCE, self._policy.max_connections)
        piece = max(PIECE, -(-size // MAX_PIECES))
        for attempt in itertools.count(1):
            mark = {"s4gupload": uuid.uuid4().hex}

            def put(store: Any, mark: dict[str, str] = mark) -> None:
                try:
                    obstore.put(
                        store,
                        key,
                        source,
                        use_multipart=True,
                        chunk_size=piece,
                        max_concurrency=num_connections,
                        attributes=mark,
                    )
                except (BaseError, OSError) as error:
                    # the upload may be complete, and only the answer lost
                    fault = RequestError.parse(error, "put_object")
                    if not (fault.may_pass or fault.code in MISSING) or not self._has(key, mark):
                        raise

            try:
                self._request("put_object", key, put, num_connections)
            except FileNotFoundError:  # the upload is gone: stores drop old uploads
                if attempt == self._policy.max_attempts:
                    raise
            else:
                return

    def _has(self, key: str, mark: dict[str, str]) -> bool:
        """Return whether an object is the one that was uploaded with this mark."""
        try:
            found: Any = obstore.get(self._store, key, options={"head": True}).attributes
        except (BaseError, OSError):
            return False
        return mark.items() <= dict(found).items()

    def copy(self, key: str, target: ObjectStore, target_key: str) -> None:
        """Copy an object: the store does it, unless it is very large or goes to another bucket."""
        size = self.head(key)["size"]
        if target is self and size <= MAX_COPY:
            self._request("copy_object", key, lambda store: obstore.copy(store, key, target_key))
            return
        with tempfile.NamedTemporaryFile(prefix="s4g-copy-") as file:
            for start in range(0, size, PIECE):
                file.write(self._get(key, start, min(start + PIECE, size))[0])
            file.flush()
            target.write(target_key, Path(file.name), size)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects, by as few requests as the store allows; missing ones are no error."""
        wanted = list(keys)
        try:
            self._request("delete_objects", wanted[0], lambda store: obstore.delete(store, wanted))
        except FileNotFoundError:  # not of S3: it stops at a missing object
            for key in wanted if len(wanted) > 1 else []:
                self.delete([key])

    def delete_folder(self, key: str) -> None:
        """Delete an object and all objects below it. Does nothing when there are none."""
        found = self._list(key)
        self.delete([key, *(other for other in found if other != key)])
        if self._access is None or all(entry["size"] for entry in found.values()):
            return
        markers = list(self._list(key))
        try:
            self._access.delete_markers(self._bucket, markers)
        except (boto.BotoCoreError, boto.ClientError) as error:
            fault = RequestError.parse(error, "delete_object")
            raise permanent_error(fault, self._uri(key)) from fault


def _code_of(error: StoreError) -> str:
    fault = error.__cause__
    return fault.code if isinstance(fault, RequestError) else ""
