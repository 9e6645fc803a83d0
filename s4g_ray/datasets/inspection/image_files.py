"""List and decode the image files of a data set, several at a time."""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Bools, Ints
from s4g_ray.data.images import decode_pixels
from s4g_ray.datasets.inspection.inventory import Inventory
from s4g_ray.errors import InputError, StoreError
from s4g_ray.progress import Update
from s4g_ray.storage import files

Item = TypeVar("Item")
Result = TypeVar("Result")


def find_missing_files(
    paths: Sequence[str], *, num_threads: int, on_progress: Update
) -> dict[int, str]:
    """Return the numbers of the files that are missing, with the reason.

    Lists each folder once, and opens no file. Raises StoreError for a store that fails.
    """
    numbers_of: dict[str, list[int]] = defaultdict(list)  # by folder
    for number, path in enumerate(paths):
        numbers_of[path.rpartition("/")[0] or "/"].append(number)

    def find_in(folder: str) -> dict[int, str]:
        try:
            names = set(files.list_names(folder))
        except StoreError:  # a fault of the store, not of these files
            raise
        except InputError as error:
            # an unknown scheme, or one whose client is not installed; others are the store's
            if isinstance(error.__cause__, ValueError | ImportError):
                return dict.fromkeys(numbers_of[folder], str(error))
            raise
        except (OSError, ValueError) as error:
            return dict.fromkeys(numbers_of[folder], f"{type(error).__name__}: {error}")
        return {
            number: "missing"
            for number in numbers_of[folder]
            if paths[number].rpartition("/")[2] not in names
        }

    found: dict[int, str] = {}
    for part in run_in_parallel(
        find_in, list(numbers_of), num_threads=num_threads, on_progress=on_progress
    ):
        found.update(part)
    return found


@dataclass(frozen=True)
class DecodedImages:
    """The results of reading and decoding M images."""

    shapes: Ints  # [M, 2] height and width in pixels; 0 where undecodable
    digests: NDArray[np.bytes_]  # [M] sha256 of the bytes; empty where undecodable
    reasons: dict[int, str]  # why an image is undecodable, by its number
    is_plain: Bools  # [M] all pixels have one colour


def decode_images(
    inventory: Inventory, rows: Ints, *, num_threads: int, on_progress: Update
) -> DecodedImages:
    """Read and decode the images of rows[M], with at most `num_threads` in memory at a time.

    Raises StoreError for a store that fails.
    """

    def decode(row: int) -> tuple[tuple[int, int], bytes, str, bool]:
        try:
            data = inventory.read_image(row)
            pixels = decode_pixels(data, values=inventory.values)
        except StoreError:
            raise
        except OSError as error:
            path = inventory.paths[inventory.files[row]]
            return (0, 0), b"", _describe_unreadable(path, error), False
        except (ValueError, EOFError) as error:
            return (0, 0), b"", str(error), False
        height, width = pixels.shape[-2:]
        is_plain = bool((pixels == pixels[:, :1, :1]).all())
        return (height, width), hashlib.sha256(data).digest(), "", is_plain

    shapes = np.zeros((len(rows), 2), dtype=np.int64)
    digests = np.zeros(len(rows), dtype="S32")
    is_plain = np.zeros(len(rows), dtype=bool)
    reasons: dict[int, str] = {}
    results = run_in_parallel(
        decode, rows.tolist(), num_threads=num_threads, on_progress=on_progress
    )
    for number, (shape, digest, reason, plain) in enumerate(results):
        shapes[number] = shape
        is_plain[number] = plain
        digests[number] = digest
        if reason:
            reasons[number] = reason
    return DecodedImages(shapes, digests, reasons, is_plain)


def _describe_unreadable(path: str, error: OSError) -> str:
    if isinstance(error, FileNotFoundError) and files.is_local(path) and Path(path).is_symlink():
        return f"a link to {Path(path).readlink()}, which does not exist"
    return f"{type(error).__name__}: {error}"


def run_in_parallel(
    work: Callable[[Item], Result], items: Sequence[Item], *, num_threads: int, on_progress: Update
) -> Iterator[Result]:
    """Yield work(item) of each item, in order.

    Submits at most 4 calls per thread ahead, however many items there are.
    """
    remaining = iter(items)
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="inspect") as pool:
        try:
            for done in range(1, len(items) + 1):
                waiting.extend(
                    pool.submit(work, item)
                    for item in islice(remaining, 4 * num_threads - len(waiting))
                )
                result = waiting.popleft().result()
                on_progress(done, len(items))
                yield result
        finally:
            for future in waiting:
                future.cancel()
