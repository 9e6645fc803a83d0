"""How s3:// is reached: the configuration as variables of the environment, how often and when a request is tried
again, and what is said of one that failed for good. The requests themselves are s3_filesystem.py's.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from s4g_ray.errors import InputError, RunError, StoreError
from s4g_ray.storage.s3_settings import VARIABLES, StorageConfig

FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 20.0
_JITTER = random.SystemRandom()  # clients that were refused together must not come back together
MISSING = {"NoSuchKey", "NoSuchVersion", "NoSuchUpload", "404"}
# beside all of status 429 and 5xx; a digest that does not fit was damaged on its way
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
_RENEW = "renew the credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or the machine's role"
_REGION = "set storage.region (or AWS_DEFAULT_REGION) to the bucket's"
DENIED = {"NoSuchBucket", "AccessDenied", "403"}
REMEDIES = {
    "NoSuchBucket": "make the bucket, or mend the URI or storage.endpoint_url",
    "AccessDenied": "give these credentials access; without s3:ListBucket, what is missing is answered so too",
    "403": "give these credentials access; without s3:ListBucket, what is missing is answered so too",
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
    "ProfileNotFound": "mend storage.profile or AWS_PROFILE, on every node",
    "NoCredentialsError": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, storage.profile or AWS_PROFILE, or give the"
    " machine a role",
}
_WAIT = "see whether the store is well; storage.max_attempts and storage.timeout_s say how long it is waited for"


@dataclass(frozen=True)
class RetryPolicy:
    """How long a store is waited for."""

    max_attempts: int  # of a request
    timeout_s: float  # for a connection, and between two pieces of an answer
    max_connections: int

    @classmethod
    def read(cls) -> RetryPolicy:
        """As the environment says, else as configured by default. Raises InputError for what is not such a number."""
        default = StorageConfig().model_dump()
        found: dict[str, Any] = {}
        for key, kind in (("max_attempts", int), ("timeout_s", float), ("max_connections", int)):
            (name,) = VARIABLES[key]
            text = os.environ.get(name) or str(default[key])
            try:
                found[key] = kind(text)
            except ValueError as error:
                raise InputError(f"{name}={text!r} is not a number") from error
            if found[key] <= 0:
                raise InputError(f"{name}={text} is not above 0")
        return cls(**found)


def wait_before(attempt: int) -> float:
    """Seconds to wait before the next attempt, the first being 1: at random, up to a limit that doubles each time."""
    return _JITTER.uniform(0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - 1)))


def code_of(error: BaseException | None) -> str:
    """What the store said in a word; of what is not its answer, the error's name."""
    return str(_answer(error).get("Error", {}).get("Code") or type(error).__name__)


def is_retryable(error: Exception) -> bool:
    """Whether an answer of the store asks for patience: 5xx, throttling, or a request that it had no time for."""
    status = _answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status == 429 or status >= 500 or code_of(error) in PASSING


def permanent_error(error: Exception, uri: str, operation: str, attempts: int) -> OSError:
    """The error of a request that failed for good: FileNotFoundError, or a StoreError that says what helps."""
    code = code_of(error)
    if code in MISSING:
        return FileNotFoundError(f"{uri} is not there")
    said = _answer(error).get("Error", {}).get("Message") or str(error)
    tried = f", {attempts} times" if attempts > 1 else ""
    remedy = REMEDIES.get(code, _WAIT if attempts > 1 else "see what the store says of it")
    return StoreError(f"{uri}: {code} ({said.strip().rstrip('.')}) to {operation}{tried}; {remedy}")


def reraise_outage(error: OSError | RunError) -> None:
    """Raise the error again when a store failed, but for a missing bucket and denied access: input, that can be mended.

    To be called where errors of reading or writing become an InputError.
    """
    store = error if isinstance(error, StoreError) else error.__cause__  # of a WriteError
    if isinstance(store, StoreError) and code_of(store.__cause__) not in DENIED:
        raise error


def _answer(error: BaseException | None) -> Mapping[str, Any]:
    response = getattr(error, "response", None)  # of botocore's ClientError
    return response if isinstance(response, Mapping) else {}
