"""Open image tables that the processes of a node share, from a cache folder on the node.

The first process that needs a table has it built, by a process that ends with its memory; the
others wait, and then all map the same files (mapped_table.py). A later start maps them again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from s4g_ray.amounts import format_bytes
from s4g_ray.config.data_schema import AS_WRITTEN, ImageOptions
from s4g_ray.data.dataset import open_dataset
from s4g_ray.data.image_table import ImageTable, View
from s4g_ray.data.schema import list_part_names
from s4g_ray.data.tables.mapped_table import (
    HEADER,
    DamagedTableError,
    count_bytes,
    map_table,
    write_table,
)
from s4g_ray.errors import InputError, RunError, WriteError
from s4g_ray.storage import files

# Parquet bytes of a view, about 20,000 rows: a smaller table takes at most 2 MB of each process
SMALL_BYTES = 500_000
ON_NODES = "every node must find it there: put it on a disk that all share, or s3://"
KEEP_DAYS = 30  # a table that no process opened for so long is removed
# what a listing gives of a file's state: the first of local files, the last of object stores
_MARKS = ("name", "size", "mtime", "ino", "ETag", "LastModified")
_VERSION = 3  # of the format of mapped tables
_README = f"""Tables of where the images of data sets lie, shared by the processes of this machine.
They take about 50 bytes an image. They are made when they are needed, and removed when they were
not used for {KEEP_DAYS} days; you may remove them whenever no run is being started.
"""


@dataclass(frozen=True)
class TableSource:
    """The rows of a data set that a table holds, and the state of their files."""

    uri: str
    view: View
    splits: tuple[str, ...]  # sorted
    state: str  # fingerprint of the data set's header and files; another when one was changed
    num_bytes: int  # of the Parquet files
    images: ImageOptions = AS_WRITTEN

    @classmethod
    def find(
        cls, uri: str, view: View, splits: Sequence[str], images: ImageOptions = AS_WRITTEN
    ) -> TableSource | None:
        """Look a view up by its files; None where there is no data set."""
        folder = files.join(uri, view)
        filesystem, path = files.filesystem_of(folder)
        names = set(list_part_names(folder))
        try:
            header = files.read_bytes(files.join(uri, "dataset.json"))
            entries = filesystem.ls(path, detail=True)
        except FileNotFoundError:
            return None
        state = [str(_VERSION), files.fingerprint(header)]
        num_bytes = 0
        for entry in sorted(entries, key=lambda entry: str(entry["name"])):
            if entry["name"].rsplit("/", 1)[-1] not in names:
                continue
            num_bytes += entry["size"]
            marks = [entry.get(key) for key in _MARKS]
            state.append(repr(marks))
        fingerprint = files.fingerprint("\n".join(state).encode())
        return cls(uri, view, tuple(sorted(splits)), fingerprint, num_bytes, images)

    @property
    def key(self) -> str:
        """Return a name of these rows, which stays when their files change."""
        return files.fingerprint(repr((self.uri, self.view, self.splits, self.images)).encode())[
            :16
        ]

    def locate(self, folder: Path) -> Path:
        """Return the folder of the table."""
        return folder / f"{self.key}-{self.state[:16]}"


def open_image_tables(
    uri: str,
    splits: Mapping[View, Sequence[str]],
    cache_dir: str | None = None,
    images: ImageOptions = AS_WRITTEN,
) -> dict[View, ImageTable]:
    """Open tables of a data set as GeoDataset.table reads them: the given splits of each view.

    Large tables are mapped from files below `cache_dir` (None: the folder of temporary files),
    which this builds where they are missing. Their memory is shared by the processes of a node, and
    a process that opens them does not read the data set. A data set that was changed is read and
    validated again. Small tables are read into memory.

    Raises InputError as open_dataset does, and for a cache folder that others may write; RunError
    where the files cannot be written.
    """
    uri = files.absolute(uri)
    found = {view: TableSource.find(uri, view, names, images) for view, names in splits.items()}
    sources = {view: source for view, source in found.items() if source is not None}
    if len(sources) < len(found) or all(
        source.num_bytes < SMALL_BYTES for source in sources.values()
    ):
        dataset = open_dataset(uri, images, remedy=ON_NODES)
        return {view: dataset.table(view, names) for view, names in splits.items()}
    return _open_mapped(make_cache_folder(cache_dir), sources)


def make_cache_folder(cache_dir: str | None) -> Path:
    """Make the cache folder of this user. Raises InputError where others may write into it."""
    folder = Path(cache_dir or tempfile.gettempdir()) / f"s4g-ray-{os.getuid()}"
    remedy = "remove it, or set data.cache_dir to a folder that only you may write"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise InputError(f"cannot make the cache folder {folder}: {error}; {remedy}") from error
    if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise InputError(f"others may write into the cache folder {folder}; {remedy}")
    if not (folder / "README.txt").exists():
        files.write_bytes(str(folder / "README.txt"), _README.encode())
    return folder


def _open_mapped(folder: Path, sources: Mapping[View, TableSource]) -> dict[View, ImageTable]:
    """Map tables; build those that are missing or damaged first, in one process."""
    tables = _map_tables(folder, sources)
    wanted = [source for view, source in sources.items() if view not in tables]
    with ExitStack() as locks:
        for source in sorted(wanted, key=lambda source: source.key):
            locks.enter_context(_locked(folder / f"{source.key}.lock"))
        tables = _map_tables(folder, sources)  # another process may have built some meanwhile
        missing = [source for view, source in sources.items() if view not in tables]
        if missing:
            for source in missing:
                remove_unused(folder, source)
            _build_apart(folder, missing)
            tables = _map_tables(folder, sources)
    for view in sources.keys() - tables.keys():
        raise RunError(
            f"the table of {view} that was built in {folder} cannot be read; remove {folder}"
        )
    return tables


def _map_tables(folder: Path, sources: Mapping[View, TableSource]) -> dict[View, ImageTable]:
    """Map the tables that are there and whole."""
    tables = {}
    for view, source in sources.items():
        table = _try_table(source.locate(folder))
        if table is not None:
            tables[view] = table
    return tables


def _try_table(path: Path) -> ImageTable | None:
    try:
        table = map_table(path)
    except (FileNotFoundError, DamagedTableError):
        return None
    with suppress(OSError):
        os.utime(path / HEADER)  # it is in use: see remove_unused
    return table


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock of this node, which the operating system releases when this process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_unused(folder: Path, source: TableSource) -> None:
    """Remove what is there of the rows of a source, and what was not used for KEEP_DAYS.

    That is a damaged table, one of an earlier state of the data set, or one that was never
    finished. Processes that have mapped a removed table go on reading it.
    """
    oldest = time.time() - KEEP_DAYS * 86_400
    for path in folder.iterdir():
        used = _last_use(path)
        if path.is_dir() and (path.name.startswith(f"{source.key}-") or used < oldest):
            shutil.rmtree(path, ignore_errors=True)
        elif path.suffix == ".lock" and used < oldest:
            path.unlink(missing_ok=True)


def _last_use(path: Path) -> float:
    """Return the seconds since 1970 at which a table was opened last, or a file was written."""
    for file in (path / HEADER, path):
        with suppress(OSError):  # not there; or another process removes it
            return file.stat().st_mtime
    return time.time()


def _build_apart(folder: Path, sources: Sequence[TableSource]) -> None:
    """Build tables in a process of its own, whose memory is free afterwards."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            pool.submit(build_tables, folder, sources).result()
        except BrokenProcessPool as error:
            raise RunError(
                f"the process that builds the image tables of {sources[0].uri} in {folder} died;"
                " give the node more memory if it ran out"
            ) from error


def build_tables(folder: Path, sources: Sequence[TableSource]) -> None:
    """Read tables of one data set and publish the files of each by one renaming.

    Raises InputError as open_dataset does, RunError where the files cannot be written or the data
    set changes meanwhile.
    """
    dataset = open_dataset(sources[0].uri, sources[0].images, remedy=ON_NODES)
    for source in sources:
        table = dataset.table(source.view, source.splits)
        if TableSource.find(source.uri, source.view, source.splits, source.images) != source:
            raise RunError(f"{source.uri} was changed while it was read; start again")
        _publish(source.locate(folder), table, source.view)


def _publish(target: Path, table: ImageTable, view: View) -> None:
    """Write the files of a table, and rename them to `target`. Raises WriteError."""
    needed = count_bytes(table)
    free = shutil.disk_usage(target.parent).free
    remedy = "make room, or set data.cache_dir to another folder"
    if needed > free:
        raise WriteError(
            f"the table of {len(table)} {view} takes {format_bytes(needed)}, but {target.parent}"
            f" has {format_bytes(free)} left; {remedy}"
        )
    temporary = target.with_name(f"{target.name}-{uuid.uuid4().hex[:8]}")
    try:
        write_table(temporary, table)
        temporary.rename(target)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:  # a process whose lock was lost was faster
            return
        raise WriteError(
            f"cannot write {format_bytes(needed)} to {target.parent}: {error.strerror or error};"
            f" {remedy}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
