"""Read the errors of object stores: which may pass, and the message and remedy of a final one.

The requests themselves are made in object_store.py.
"""

from __future__ import annotations

import html
import re

from s4g_ray.errors import RunError, StoreError
from s4g_ray.storage.s3_settings import anonymous_variable, find_endpoint, is_anonymous

MISSING = {"NoSuchKey", "NoSuchVersion", "NoSuchUpload", "BlobNotFound", "404"}
# temporary errors, in addition to status 408, 429 and 5xx; a wrong digest is damage in transit
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
WRONG_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "301"}
ASK_REGION = {*WRONG_REGION, "400"}  # an answer without a body, to head_object, has no code
_RENEW = (
    "renew the credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or the"
    " machine's role"
)
_REGION = "set storage.region (or AWS_DEFAULT_REGION) to the bucket's region"
_BUCKET = "make the bucket, or fix the URI or storage.endpoint_url"
_GRANT = (
    "give these credentials access; without s3:ListBucket, a missing object fails like this too"
)
_NOT_PUBLIC = (
    "this is not public, or its objects are missing: set storage.anonymous=false, unset"
    " {variable}, and give credentials"
)
_GOOGLE = (
    "set GOOGLE_APPLICATION_CREDENTIALS, give the machine a role, or set storage.anonymous=true for"
    " a public bucket"
)
DENIED = {"NoSuchBucket", "ContainerNotFound", "AccessDenied", "403"}
REMEDIES = {
    "NoSuchBucket": _BUCKET,
    "ContainerNotFound": _BUCKET,
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
    **dict.fromkeys(WRONG_REGION, _REGION),
    "ProfileNotFound": "fix storage.profile or AWS_PROFILE, on every node",
    "NoCredentialsError": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, storage.profile or"
    " AWS_PROFILE, give the machine a role, or set storage.anonymous=true for a public bucket",
    "InvalidPathError": "rename that object: keys must hold no empty parts, '.' and '..' between"
    " slashes",
}
NO_ANSWER = {"EndpointConnectionError", "ReadTimeoutError", "ConnectionError"}
_ENDPOINT = (
    "check that a store answers at {endpoint}, or correct storage.endpoint_url (or"
    " AWS_ENDPOINT_URL_S3); to wait longer for it, raise storage.max_attempts or storage.timeout_s"
)
_WAIT = (
    "check that the store works; to wait longer for it, raise storage.max_attempts or"
    " storage.timeout_s"
)


class NoConditionsError(Exception):
    """The store does not know conditional writes."""


def lacks_conditions(error: Exception) -> bool:
    """Return whether an error of obstore says that the store has no conditional writes."""
    text = str(error)
    is_refused = "status code: 501" in text or "NotImplemented" in text
    return is_refused or type(error).__name__ == "NotSupportedError"


class RequestError(Exception):
    """A failed request: the code and message of the store's answer, and how often it was tried.

    Is the cause of the StoreError that the caller gets: it is shorter than obstore's own error.
    """

    def __init__(
        self, code: str, message: str, operation: str, attempts: int, *, may_pass: bool
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.operation = operation
        self.attempts = attempts
        self.may_pass = may_pass  # a retry may succeed

    @classmethod
    def parse(cls, error: Exception, operation: str) -> RequestError:
        """Read an error of obstore or botocore.

        obstore's errors are text: the request, the number of its retries, and the status and body
        of the store's answer, or the reason why there was none.
        """
        text = str(error)
        status = int(_find(r"non-2xx status code: (\d+)", text) or 0)
        has_no_answer = "HTTP error: " in text
        code = _code_of(error, text, status)
        return cls(
            code,
            _message_of(text, code),
            _operation_of(text) or operation,
            1 + int(_find(r", after (\d+) retries", text) or 0),
            may_pass=has_no_answer or status in (408, 429) or status >= 500 or code in PASSING,
        )


def _find(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.DOTALL)
    return html.unescape(match[1]).strip() if match else ""


def _code_of(error: Exception, text: str, status: int) -> str:
    """Return the error code of the store's answer, or a name of the failure where it has none."""
    code = _find(r"<Code>(.*?)</Code>", text)
    if code or status:
        return code or str(status)
    if isinstance(error, FileNotFoundError) and text.startswith("Object at location"):
        return "404"  # of one object of a bulk delete
    if "Received redirect without LOCATION" in text:
        return "PermanentRedirect"
    if "HTTP error: " in text:
        kind = _find(r"kind: (\w+)", text)
        return {"Connect": "EndpointConnectionError", "Timeout": "ReadTimeoutError"}.get(
            kind, "ConnectionError"
        )
    return _find(r"External AWS credential provider: (\w+): ", text) or type(error).__name__


def _message_of(text: str, code: str) -> str:
    message = _find(r"<Message>(.*?)</Message>", text)
    if message:
        return message.rstrip(".")
    url = _find(r"Error performing \w+ (\S+) in ", text)
    if code == "EndpointConnectionError" and url:
        return f'Could not connect to the endpoint URL: "{url}"'
    lines = text.strip().splitlines() or [code]
    return lines[0].rpartition(" - ")[2].strip().rstrip(".")


def _operation_of(text: str) -> str:
    """Return the operation of a request of a multipart upload; empty for another request."""
    match = re.search(r"Error performing (\w+) (\S+) in ", text)
    if not match:
        return ""
    method, url = match.groups()
    if "uploads" in url.partition("?")[2].split("="):
        return "create_multipart_upload"
    if "uploadId=" not in url:
        return ""
    return {"PUT": "upload_part", "POST": "complete_multipart_upload"}.get(
        method, "abort_multipart_upload"
    )


def permanent_error(fault: RequestError, uri: str) -> OSError:
    """Return the final error of a request: FileNotFoundError, or a StoreError with the remedy."""
    if fault.code in MISSING:
        return FileNotFoundError(f"{uri} is not there")
    if fault.attempts > 1:
        request = f"{fault.operation}, {fault.attempts} times"
        remedy = REMEDIES.get(fault.code, _WAIT)
    else:
        request = fault.operation
        remedy = REMEDIES.get(fault.code, "see the store's documentation of this error")
    scheme = uri.partition("://")[0]
    if fault.code in ("AccessDenied", "403") and is_anonymous(scheme):
        remedy = _NOT_PUBLIC.format(variable=anonymous_variable(scheme))
    endpoint = find_endpoint()
    if fault.code in NO_ANSWER and endpoint is not None and scheme in ("s3", "s3a"):
        remedy = _ENDPOINT.format(endpoint=endpoint)
    if "computeMetadata" in fault.message:  # the last place where Google's credentials may be
        remedy = _GOOGLE
    if "Account must be specified" in fault.message:
        remedy = "set AZURE_STORAGE_ACCOUNT_NAME, and a key or a login of that account"
    return StoreError(f"{uri}: {fault.code} ({fault.message}) to {request}; {remedy}")


def reraise_outage(error: OSError | RunError) -> None:
    """Raise the error again when the store failed.

    A missing bucket and denied access are not failures of the store, but input errors that the
    user can fix. Call this where an error of reading or writing becomes an InputError.
    """
    store_error = error if isinstance(error, StoreError) else error.__cause__  # of a WriteError
    if not isinstance(store_error, StoreError):
        return
    fault = store_error.__cause__
    if not isinstance(fault, RequestError) or fault.code not in DENIED:
        raise error
