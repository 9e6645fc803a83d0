"""CVACT: street panoramas and satellite images of Canberra; train and val by list, test by what is on disk.

ACT_data.mat (MATLAB 5) holds panoIds, utm (metres, zone 55 south) and the structs trainSet and valSet, whose
second field lists 1-based rows. Panoramas are shipped with north in their centre column.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.io
from pyproj import Transformer
from scipy.io.matlab import MatReadError

from s4g_ray.arrays import Floats64, Ints
from s4g_ray.data.dataset import GeoDataset, refuse_existing
from s4g_ray.datasets.source import Report, Row, SourceFolder, silent
from s4g_ray.errors import InputError
from s4g_ray.storage import files

MAT = "ACT_data.mat"
PANORAMAS, SATELLITES = "streetview", "satview_polish"
PANORAMA_END, SATELLITE_END = "_grdView.jpg", "_satView_polish.jpg"
SETS = {"train": "trainSet", "val": "valSet"}
LAYOUTS = {"ANU_data_small": [MAT, f"ANU_data_small/{PANORAMAS}", f"ANU_data_small/{SATELLITES}"]}
VIEWS = {"references": "satellite image", "queries": "street panorama, north in the centre"}
EASTINGS_M, NORTHINGS_M = (
    (100_000.0, 900_000.0),
    (1_000_000.0, 10_000_000.0),
)  # what a UTM zone spans, south


def convert(
    source: str,
    target: str,
    *,
    test: bool = True,
    strict: bool = False,
    report: Report = silent,
) -> GeoDataset:
    """Convert a CVACT folder, images referenced where they are.

    A place is a row of ACT_data.mat. The same panorama may be in val and in test, so a test image has its row
    plus the number of rows as id. `test=False` is for copies without ANU_data_test. Raises InputError for
    another layout, a faulty ACT_data.mat, missing images when `strict`, and a target that holds a data set.
    """
    target = files.absolute(target)
    refuse_existing(target)
    source_folder = SourceFolder(source, report)
    source_folder.choose(LAYOUTS)
    mat = _Mat.read(source_folder)
    images = [
        _Image(split, "ANU_data_small", mat.names[row], int(row), int(row))
        for split, rows in _listed(source_folder, mat).items()
        for row in rows
    ]
    images += _test_images(source_folder, mat) if test else []
    whole = [
        image
        for image in images
        if source_folder.pair(image.path(SATELLITES), image.path(PANORAMAS))
    ]
    known = [image for image in whole if image.place_id < len(mat.names)]
    rows = np.array([image.place_id for image in known], dtype=np.int64)
    positions = dict(zip(rows.tolist(), mat.degrees(rows), strict=True))
    references, queries = [], []
    for image in whole:
        lat, lon = positions.get(image.place_id, (None, None))
        common: dict[str, Any] = {
            "id": image.id,
            "place_id": image.place_id,
            "split": image.split,
            "lat": lat,
            "lon": lon,
            "source_id": image.name,
        }
        references.append(Row(**common, uri=source_folder.join(image.path(SATELLITES))))
        queries.append(
            Row(**common, uri=source_folder.join(image.path(PANORAMAS)), heading_deg=0.0)
        )
    if len(known) < len(whole):
        source_folder.note(
            f"test images that {MAT} does not list, kept without coordinates: {len(whole) - len(known):,}"
        )
    return source_folder.write(
        target, references, queries, name="cvact", views=VIEWS, strict=strict
    )


@dataclass(frozen=True)
class _Image:
    split: str
    folder: str
    name: str
    id: int
    place_id: int

    def path(self, view: str) -> str:
        end = PANORAMA_END if view == PANORAMAS else SATELLITE_END
        return f"{self.folder}/{view}/{self.name}{end}"


def _listed(source_folder: SourceFolder, mat: _Mat) -> dict[str, list[int]]:
    """The rows of train and val, each once."""
    rows = {}
    for split, listed in mat.sets.items():
        rows[split] = list(dict.fromkeys(listed))
        if len(rows[split]) < len(listed):
            source_folder.note(
                f"rows that {SETS[split]} repeats, taken once: {len(listed) - len(rows[split]):,}"
            )
    shared = set(rows["train"]).intersection(rows["val"])
    if shared:
        raise InputError(
            f"{mat.uri}: trainSet and valSet share {len(shared):,} rows, the first {min(shared) + 1}; restore the file"
        )
    return rows


def _test_images(source_folder: SourceFolder, mat: _Mat) -> list[_Image]:
    """Every id in either folder of ANU_data_test, sorted; source_folder.pair leaves out what only one of them has."""
    folders = {
        f"ANU_data_test/{PANORAMAS}": PANORAMA_END,
        f"ANU_data_test/{SATELLITES}": SATELLITE_END,
    }
    if not all(source_folder.has(folder) for folder in folders):
        raise InputError(
            f"{source_folder.uri} lacks {' or '.join(folders)}; add them, or give --no-test (test=False) to convert"
            " train and val alone"
        )
    names: set[str] = set()
    for folder, end in folders.items():
        shown = sorted(name for name in source_folder.names(folder) if not name.startswith("."))
        other = [name for name in shown if not name.endswith(end)]
        if other:
            source_folder.note(
                f"files of {folder} left out, as they do not end in {end}: {len(other):,}"
            )
        names.update(name.removesuffix(end) for name in shown if name.endswith(end))
    row_of = {name: row for row, name in reversed(list(enumerate(mat.names)))}
    total = len(mat.names)
    images = []
    for position, name in enumerate(sorted(names)):
        row, unlisted = row_of.get(name), 2 * total + position
        identity = (unlisted, unlisted) if row is None else (row + total, row)
        images.append(_Image("test", "ANU_data_test", name, *identity))
    return images


@dataclass(frozen=True)
class _Mat:
    """What ACT_data.mat says: names[N], utm[N, 2] metres, and 0-based rows of train and val."""

    uri: str
    names: list[str]
    utm: Floats64
    sets: dict[str, list[int]]

    @classmethod
    def read(cls, source_folder: SourceFolder) -> _Mat:
        uri, wanted = source_folder.join(MAT), ["panoIds", "utm", *SETS.values()]
        try:
            stream: Any = io.BytesIO(source_folder.read_bytes(MAT))  # the stubs know paths alone
            found = scipy.io.loadmat(stream, variable_names=wanted)
        except (
            ValueError,
            TypeError,
            OSError,
            NotImplementedError,
            IndexError,
            MatReadError,
            zlib.error,
        ) as error:
            raise InputError(f"{uri} is not a MATLAB 5 file: {error}") from error
        missing = [name for name in wanted if name not in found]
        if missing:
            raise InputError(f"{uri} lacks {', '.join(missing)}; restore the file")
        names = [_text(entry) for entry in np.ravel(found["panoIds"])]
        utm = np.asarray(found["utm"], dtype=np.float64)
        if utm.shape != (len(names), 2):
            raise InputError(
                f"{uri}: utm has shape {utm.shape}, but {len(names)} panoIds need ({len(names)}, 2)"
            )
        sets = {split: _rows(uri, name, found[name], len(names)) for split, name in SETS.items()}
        return cls(uri, names, utm, sets)

    def degrees(self, rows: Ints) -> list[tuple[float, float]]:
        """WGS84 latitude and longitude of rows[M]; utm holds easting and northing, in either order."""
        swapped = int(
            np.nanmedian(self.utm[:, 0]) > NORTHINGS_M[0]
        )  # of all rows: a faulty one is then refused
        easting, northing = self.utm[rows, swapped], self.utm[rows, 1 - swapped]
        inside = (northing > NORTHINGS_M[0]) & (northing < NORTHINGS_M[1])
        inside &= (easting > EASTINGS_M[0]) & (easting < EASTINGS_M[1])
        if not inside.all():
            row = int(rows[~inside][0])
            raise InputError(
                f"{self.uri}: utm row {row + 1} is {self.utm[row].tolist()}; an easting of 100,000 to 900,000 m and"
                " a northing of 1,000,000 to 10,000,000 m are wanted, in the same order in every row"
            )
        lon, lat = Transformer.from_crs("EPSG:32755", "EPSG:4326", always_xy=True).transform(
            easting, northing
        )
        return list(zip(np.asarray(lat).tolist(), np.asarray(lon).tolist(), strict=True))


def _text(entry: Any) -> str:
    """A panorama's name, from a cell (an array of one string) or a row of a character matrix (padded)."""
    while isinstance(entry, np.ndarray) and entry.size == 1:
        entry = entry.item()
    return str(entry).strip()


def _rows(uri: str, name: str, struct: Any, num_rows: int) -> list[int]:
    """The field trainInd or valInd of a struct (else its second), 1-based, as 0-based rows."""
    fields: tuple[str, ...] = struct.dtype.names or ()
    field = name.removesuffix("Set") + "Ind"
    if struct.size != 1 or (field not in fields and len(fields) < 2):
        raise InputError(
            f"{uri}: {name} is not one struct with a field {field}, 1-based rows; it has {fields}"
        )
    at = fields.index(field) if field in fields else 1
    listed = np.ravel(struct.item()[at])
    if listed.dtype.kind not in "iuf":
        raise InputError(f"{uri}: {name}.{fields[at]} does not hold numbers; restore the file")
    numbers = listed.astype(np.float64)
    faulty = ~((numbers >= 1) & (numbers <= num_rows) & (numbers == np.floor(numbers)))
    if faulty.any():
        raise InputError(
            f"{uri}: {name}.{fields[at]} holds {listed[faulty][0]}, which is no row of 1 to {num_rows}"
        )
    rows: list[int] = (numbers.astype(np.int64) - 1).tolist()
    return rows
