"""Define Refusal: a request that is not answered, with its status, code and message."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping


class Refusal(Exception):  # noqa: N818 (an answer, not a failure)
    """A request that the service refuses. Picklable.

    status: of HTTP. code: a word for programs. message: for people, with value, limit and remedy.
    retry_after_s: when another try may succeed.
    """

    def __init__(
        self, status: int, code: str, message: str, retry_after_s: float | None = None
    ) -> None:
        super().__init__(status, code, message, retry_after_s)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        """Return the JSON text of the answer: {"error": {"code", "message"}}."""
        return json.dumps({"error": {"code": self.code, "message": self.message}}).encode()

    def headers(self) -> Mapping[str, str]:
        """Return the headers of the answer, beside its type and length."""
        found = {}
        if self.retry_after_s is not None:
            found["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        return found
