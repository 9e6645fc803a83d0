"""Tell HEIC photos apart, and let Pillow open them where pillow-heif is installed."""

from __future__ import annotations

from s4g_ray.errors import BadImageError

_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def is_heif(data: bytes) -> bool:
    """Return whether the first 64 bytes of a file are those of a HEIC photo."""
    is_boxed = data[4:8] == b"ftyp" and data[8:12] in _BRANDS
    return is_boxed and b"avif" not in data[8:64]  # AVIF is read by Pillow itself


def enable_heif(name: str = "") -> None:
    """Let Pillow open HEIC files. Raises BadImageError, of a photo's name, without pillow-heif."""
    try:
        import pillow_heif
    except ImportError as error:
        message = "a HEIC photo needs pillow-heif; pip install 's4g-ray[heic]'"
        raise BadImageError(f"{name}: {message}" if name else message) from error
    pillow_heif.register_heif_opener()
