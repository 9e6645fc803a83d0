"""Keep what decoders print of damaged photos off standard error: it is in the photo's answer."""

from __future__ import annotations

import ctypes
import logging
import warnings
from contextlib import suppress

from PIL import _imaging


def silence_decoders() -> None:
    """Silence Pillow's log and warnings, and libtiff, which prints a line for each bad row."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)
    with suppress(OSError, AttributeError):  # a Pillow that was built without libtiff
        library = ctypes.CDLL(_imaging.__file__)  # its symbols are those of libtiff, too
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            set_handler = getattr(library, name)
            set_handler.argtypes = [ctypes.c_void_p]
            set_handler.restype = ctypes.c_void_p
            set_handler(None)
