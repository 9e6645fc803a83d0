"""Describe names of files that are not UTF-8 (Python keeps lone surrogates), and empty lists."""

from __future__ import annotations

from collections.abc import Sequence

from s4g_ray.errors import InputError


def is_utf8(name: str) -> bool:
    """Return whether a name can be written as UTF-8."""
    if name.isascii():
        return True
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def describe_odd(names: Sequence[str]) -> str:
    """Return the number of names that are not UTF-8, the first one escaped, and the remedy."""
    escaped = names[0].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return f"{len(names):,}, the first '{escaped}'; rename them, as by `convmv -f latin1 -t utf8`"


def empty_list_error(uri: str) -> InputError:
    """Return the error of a list without entries."""
    return InputError(
        f"{uri} lists nothing: it is empty, or ends after its header; restore the file"
    )
