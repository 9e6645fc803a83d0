"""Define DatasetHeader: dataset.json, which lists the parts of a data set.

Opening a data set compares names, sizes and numbers of rows of its parts with the header, by one
listing of each view's folder; `s4g check` compares the sha256 of each too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from s4g_ray.amounts import count_noun
from s4g_ray.data.image_table import View
from s4g_ray.data.pixels.image_values import AS_STORED, ImageValues
from s4g_ray.errors import InputError, RunError
from s4g_ray.storage import files
from s4g_ray.storage.store_errors import reraise_outage

HEADER = "dataset.json"
FORMAT = "s4g-dataset"
VERSION = 2
PART_NAME = re.compile(r"(references|queries)/part-[^/\0]*\.parquet")
# remedies of a data set that is not there: of an argument, and of a configuration's
MAKE_ONE = "make one with `s4g convert` or write_dataset"
CORRECT_PATH = f"correct the path, or {MAKE_ONE}"
CORRECT_KEY = f"correct data.uri, or {MAKE_ONE}"
COPY_AGAIN = "copy the data set again (as by `rsync -a --checksum`), or convert again"


@dataclass(frozen=True)
class DatasetPart:
    """A Parquet file of a data set."""

    name: str  # references/part-00000.parquet
    rows: int
    num_bytes: int
    sha256: str

    @classmethod
    def from_json(cls, value: Any) -> DatasetPart:
        """Take an entry of `parts`. Raises KeyError, TypeError or ValueError for another value."""
        part = cls(
            str(value["name"]), int(value["rows"]), int(value["bytes"]), str(value["sha256"])
        )
        if not PART_NAME.fullmatch(part.name):
            raise ValueError(f"{part.name!r} is no part's name")
        return part

    def to_json(self) -> dict[str, Any]:
        """Return the entry of `parts`."""
        return {
            "name": self.name,
            "rows": self.rows,
            "bytes": self.num_bytes,
            "sha256": self.sha256,
        }


@dataclass(frozen=True)
class DatasetHeader:
    """The values of dataset.json."""

    name: str
    fingerprint: str
    counts: Mapping[str, Mapping[str, int]]  # rows by view and split
    parts: tuple[DatasetPart, ...]
    views: Mapping[str, str] = field(default_factory=dict)
    # the folder that relative paths of images start from: relative to the data set, or absolute;
    # None: the data set's own
    images_root: str | None = None
    values: ImageValues = AS_STORED  # how the values of the images become bytes

    @classmethod
    def read(cls, uri: str, *, remedy: str = CORRECT_PATH) -> DatasetHeader:
        """Read the header of a data set's folder.

        Raises InputError when it is missing (with this remedy), damaged, or of another format or
        version.
        """
        try:
            value = files.read_json(files.join(uri, HEADER))
        except FileNotFoundError as error:
            raise InputError(f"no data set at {uri}: {HEADER} is missing; {remedy}") from error
        except RunError as error:
            reraise_outage(error)
            raise InputError(str(error)) from error
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise InputError(f"{uri}/{HEADER} is not of format {FORMAT!r}")
        if value.get("version") != VERSION:
            raise InputError(
                f"{uri}/{HEADER} is of version {value.get('version')!r}, and this release reads"
                f" version {VERSION}; convert again"
            )
        return cls._from_json(uri, value)

    @classmethod
    def _from_json(cls, uri: str, value: Mapping[str, Any]) -> DatasetHeader:
        missing = [key for key in ("name", "fingerprint") if not isinstance(value.get(key), str)]
        if missing:
            raise InputError(
                f"{uri}/{HEADER} lacks {' and '.join(missing)}; make the data set again"
            )
        root = value.get("images_root")
        bands = value.get("bands")
        try:
            parts = tuple(DatasetPart.from_json(part) for part in value["parts"])
            return cls(
                name=value["name"],
                fingerprint=value["fingerprint"],
                counts={view: dict(counts) for view, counts in value.get("counts", {}).items()},
                parts=parts,
                views=dict(value.get("views", {})),
                images_root=None if root is None else str(root),
                values=ImageValues(value.get("stretch"), None if bands is None else tuple(bands)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{uri}/{HEADER} is damaged ({error!r}); {COPY_AGAIN}") from error

    def write(self, uri: str) -> None:
        """Write the header into a data set's folder."""
        value: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "fingerprint": self.fingerprint,
            "counts": self.counts,
            "views": self.views,
        }
        if self.images_root is not None:
            value["images_root"] = self.images_root
        if self.values.stretch is not None:
            value["stretch"] = self.values.stretch
        if self.values.bands is not None:
            value["bands"] = list(self.values.bands)
        value["parts"] = [part.to_json() for part in self.parts]
        files.write_json(files.join(uri, HEADER), value)

    def parts_of(self, view: View) -> list[DatasetPart]:
        """Return the parts of a view, in their order."""
        return [part for part in self.parts if part.name.startswith(f"{view}/")]


def check_listing(uri: str, view: View, parts: Sequence[DatasetPart]) -> None:
    """Compare the files of a view's folder with its parts, by one listing.

    Raises InputError that names the first part that is missing, added, or of another size.
    """
    if not parts:
        raise InputError(f"{uri}/{HEADER} lists no part of {view}; convert again")
    sizes = list_parts(uri, view)
    lacking = [part for part in parts if part.name not in sizes]
    if lacking:
        others = f" ({len(lacking)} of {len(parts)} parts of {view} are)" if lacking[1:] else ""
        raise InputError(
            f"{files.join(uri, lacking[0].name)}, a part of {count_noun(lacking[0].rows, 'row')},"
            f" is missing{others}; {COPY_AGAIN}"
        )
    for part in parts:
        if sizes[part.name] != part.num_bytes:
            raise InputError(
                f"{files.join(uri, part.name)} has {sizes[part.name]:,} bytes, but {HEADER} says"
                f" {part.num_bytes:,}: it was cut off or altered; {COPY_AGAIN}"
            )
    added = sorted(sizes.keys() - {part.name for part in parts})
    if added:
        raise InputError(
            f"{files.join(uri, added[0])} was added: {HEADER} does not list it; remove it, or"
            " write all rows anew with write_dataset"
        )


def list_parts(uri: str, view: View) -> dict[str, int]:
    """Return the bytes of the Parquet parts in a view's folder, by their names."""
    filesystem, path = files.filesystem_of(files.join(uri, view))
    filesystem.invalidate_cache()
    try:
        entries = filesystem.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    names = {f"{view}/{entry['name'].rsplit('/', 1)[-1]}": entry for entry in entries}
    return {
        name: int(entry["size"] or 0) for name, entry in names.items() if PART_NAME.fullmatch(name)
    }
