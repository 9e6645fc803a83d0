"""Decide which S3 errors are retried and for how long, and word the final error.

The requests themselves are made in s3_filesystem.py.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from s4g_ray.errors import InputError, RunError, StoreError
from s4g_ray.storage.s3_settings import VARIABLES, StorageConfig

FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 20.0
_JITTER = random.SystemRandom()  # clients that were throttled together must not retry together
MISSING = {"NoSuchKey", "NoSuchVersion", "NoSuchUpload", "404"}
# temporary errors, in addition to status 429 and 5xx; a wrong digest is damage in transit
PASSING = {
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "BandwidthLimitExceeded",
    "RequestTimeout",
    "RequestTimeoutException",
    "InternalError",
    "ServiceUnavailable",
    "OperationAborted",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
    "IncompleteBody",
}
_RENEW = (
    "renew the credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or the"
    " machine's role"
)
_REGION = "set storage.region (or AWS_DEFAULT_REGION) to the bucket's region"
_GRANT = (
    "give these credentials access; without s3:ListBucket, a missing object fails like this too"
)
DENIED = {"NoSuchBucket", "AccessDenied", "403"}
REMEDIES = {
    "NoSuchBucket": "make the bucket, or fix the URI or storage.endpoint_url",
    "AccessDenied": _GRANT,
    "403": _GRANT,
    "InvalidAccessKeyId": _RENEW,
    "SignatureDoesNotMatch": _RENEW,
    "ExpiredToken": _RENEW,
    "InvalidToken": _RENEW,
    "PartialCredentialsError": _RENEW,
    "CredentialRetrievalError": _RENEW,
    "TokenRetrievalError": _RENEW,
    "RequestTimeTooSkewed": "set this machine's clock",
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "301": _REGION,
    "NoRegionError": _REGION,
    "ProfileNotFound": "fix storage.profile or AWS_PROFILE, on every node",
    "NoCredentialsError": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, storage.profile or"
    " AWS_PROFILE, or give the machine a role",
}
_WAIT = (
    "check that the store works; to wait longer for it, raise storage.max_attempts or"
    " storage.timeout_s"
)
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class RetryPolicy:
    """The limits of requests to a store: attempts, seconds, connections."""

    max_attempts: int  # of one request
    timeout_s: float  # for a connection, and between two pieces of an answer
    max_connections: int  # of this process

    @classmethod
    def read(cls) -> RetryPolicy:
        """Read the policy from the environment; variables that are not set have the defaults.

        Raises InputError for a value that is not a number above 0.
        """
        defaults = StorageConfig()
        return cls(
            max_attempts=_read_number("max_attempts", int, defaults.max_attempts),
            timeout_s=_read_number("timeout_s", float, defaults.timeout_s),
            max_connections=_read_number("max_connections", int, defaults.max_connections),
        )


def _read_number(key: str, kind: type[Number], default: Number) -> Number:
    """Read a number above 0 from the environment variable of a key."""
    (name,) = VARIABLES[key]
    text = os.environ.get(name) or str(default)
    try:
        number = kind(text)
    except ValueError as error:
        raise InputError(f"{name}={text!r} is not a number; set one above 0") from error
    if number <= 0:
        raise InputError(f"{name}={text} is not above 0; set a number above 0")
    return number


def wait_before(attempt: int) -> float:
    """Draw the seconds to wait after a failed attempt, counted from 1.

    The limit of the draw doubles with each attempt, from FIRST_WAIT_S to LONGEST_WAIT_S.
    """
    return _JITTER.uniform(0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - 1)))


def code_of(error: BaseException | None) -> str:
    """Return the error code of the store's answer; for other errors, the name of the error."""
    return str(_answer(error).get("Error", {}).get("Code") or type(error).__name__)


def is_retryable(error: Exception) -> bool:
    """Return whether a retry may succeed: after 5xx, throttling or a timeout of the request."""
    status = _answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status == 429 or status >= 500 or code_of(error) in PASSING


def permanent_error(error: Exception, uri: str, operation: str, attempts: int) -> OSError:
    """Return the final error of a request: FileNotFoundError, or a StoreError with the remedy."""
    code = code_of(error)
    if code in MISSING:
        return FileNotFoundError(f"{uri} is not there")
    message = _answer(error).get("Error", {}).get("Message") or str(error)
    message = message.strip().rstrip(".")
    if attempts > 1:
        request = f"{operation}, {attempts} times"
        remedy = REMEDIES.get(code, _WAIT)
    else:
        request = operation
        remedy = REMEDIES.get(code, "see the store's documentation of this error")
    return StoreError(f"{uri}: {code} ({message}) to {request}; {remedy}")


def reraise_outage(error: OSError | RunError) -> None:
    """Raise the error again when the store failed.

    A missing bucket and denied access are not failures of the store, but input errors that the
    user can fix. Call this where an error of reading or writing becomes an InputError.
    """
    store_error = error if isinstance(error, StoreError) else error.__cause__  # of a WriteError
    if isinstance(store_error, StoreError) and code_of(store_error.__cause__) not in DENIED:
        raise error


def _answer(error: BaseException | None) -> Mapping[str, Any]:
    response = getattr(error, "response", None)  # an attribute of botocore's ClientError
    return response if isinstance(response, Mapping) else {}
