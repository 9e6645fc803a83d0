"""What went wrong in a Ray task, in its own words."""

from __future__ import annotations

import re


def reason_of(error: Exception) -> str:
    """The last line of an error's traceback that names an exception which is not Ray's own, or its last line."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    named = [line for line in lines if re.match(r"(?!ray\.)[\w.]*(Error|Exception|Arrow\w+): ", line)]
    return (named or lines)[-1]
