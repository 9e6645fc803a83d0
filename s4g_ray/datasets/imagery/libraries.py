"""Check, when it is imported, that the libraries that read imagery are installed.

They are an extra. Modules of this package that users import name this one before any other, so
that the error is this one's.
"""

from __future__ import annotations

import importlib.util

from s4g_ray.errors import InputError

NAMES = ("rasterio", "pyproj", "shapely")


def check_libraries() -> None:
    """Raise InputError, with the command that installs them, where a library is missing."""
    missing = [name for name in NAMES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"reading imagery needs {', '.join(missing)}, which is not installed;"
            " pip install 's4g-ray[imagery]'"
        )


check_libraries()
