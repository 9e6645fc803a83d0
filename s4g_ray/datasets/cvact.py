"""Convert CVACT: street panoramas and satellite images of Canberra.

ACT_data.mat lists train and val; test holds the images in its folders. ACT_data.mat (MATLAB 5)
holds panoIds, utm (metres, zone 55 south) and the structs trainSet and valSet, whose second field
lists 1-based rows. Panoramas are published with north in their centre column.
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
from s4g_ray.datasets.lists.file_names import empty_list_error
from s4g_ray.datasets.published.archive_root import open_root
from s4g_ray.datasets.source import SourceFolder
from s4g_ray.datasets.source_rows import Row
from s4g_ray.errors import InputError
from s4g_ray.progress import Report, ignore_report
from s4g_ray.storage import files

MAT = "ACT_data.mat"
PANORAMAS = "streetview"
SATELLITES = "satview_polish"
PANORAMA_END = "_grdView.jpg"
SATELLITE_END = "_satView_polish.jpg"
SETS = {"train": "trainSet", "val": "valSet"}
LAYOUTS = {"ANU_data_small": [MAT, f"ANU_data_small/{PANORAMAS}", f"ANU_data_small/{SATELLITES}"]}
VIEWS = {"references": "satellite image", "queries": "street panorama, north in the centre"}
# the range of a UTM zone, southern hemisphere
EASTINGS_M = (100_000.0, 900_000.0)
NORTHINGS_M = (1_000_000.0, 10_000_000.0)


def convert(
    source: str,
    target: str,
    *,
    test: bool = True,
    strict: bool = False,
    report: Report = ignore_report,
) -> GeoDataset:
    """Convert a CVACT folder; images stay where they are.

    A place is a row of ACT_data.mat. The same panorama may be in val and in test, so the id of a
    test image is its row plus the number of rows. Use `test=False` for copies without
    ANU_data_test. Raises InputError for another layout, a faulty ACT_data.mat, missing images when
    `strict`, and a target that holds a data set.
    """
    target = files.absolute(target)
    refuse_existing(target)
    source_folder, _ = open_root(source, LAYOUTS, report)
    mat = _Mat.read(source_folder)
    images = [
        _Image(split, "ANU_data_small", mat.names[row], int(row), int(row))
        for split, rows in _unique_rows(source_folder, mat).items()
        for row in rows
    ]
    if test:
        images += _find_test_images(source_folder, mat)
    whole = [
        image
        for image in images
        if source_folder.has_pair(image.path(SATELLITES), image.path(PANORAMAS))
    ]
    listed = [image for image in whole if image.place_id < len(mat.names)]
    rows = np.array([image.place_id for image in listed], dtype=np.int64)
    positions = dict(zip(rows.tolist(), mat.compute_degrees(rows), strict=True))
    references: list[Row] = []
    queries: list[Row] = []
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
    if len(listed) < len(whole):
        source_folder.add_note(
            f"test images that {MAT} does not list, kept without coordinates:"
            f" {len(whole) - len(listed):,}"
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


def _unique_rows(source_folder: SourceFolder, mat: _Mat) -> dict[str, list[int]]:
    """Return the rows of train and val, each once. Raises InputError when a row is in both."""
    rows = {}
    for split, listed in mat.sets.items():
        rows[split] = list(dict.fromkeys(listed))
        if len(rows[split]) < len(listed):
            source_folder.add_note(
                f"rows that {SETS[split]} repeats, used once: {len(listed) - len(rows[split]):,}"
            )
    shared = set(rows["train"]).intersection(rows["val"])
    if shared:
        raise InputError(
            f"{mat.uri}: trainSet and valSet share {len(shared):,} rows,"
            f" the first {min(shared) + 1}; restore the file"
        )
    return rows


def _find_test_images(source_folder: SourceFolder, mat: _Mat) -> list[_Image]:
    """Return an image for each panorama id in either folder of ANU_data_test, sorted by id.

    Ids that only one folder has are included: `has_pair` counts them as missing images.
    """
    folders = {
        f"ANU_data_test/{PANORAMAS}": PANORAMA_END,
        f"ANU_data_test/{SATELLITES}": SATELLITE_END,
    }
    if not all(source_folder.has(folder) for folder in folders):
        raise InputError(
            f"{source_folder.uri} lacks {' or '.join(folders)}; add them, or give --no-test"
            " (test=False) to convert train and val only"
        )
    names: set[str] = set()
    for folder, end in folders.items():
        found = sorted(
            name for name in source_folder.list_names(folder) if not name.startswith(".")
        )
        other = [name for name in found if not name.endswith(end)]
        if other:
            source_folder.add_note(
                f"files of {folder} left out because they do not end in {end}: {len(other):,}"
            )
        names.update(name.removesuffix(end) for name in found if name.endswith(end))
    row_of = {name: row for row, name in reversed(list(enumerate(mat.names)))}
    num_rows = len(mat.names)
    images = []
    for position, name in enumerate(sorted(names)):
        row = row_of.get(name)
        if row is None:
            image_id = 2 * num_rows + position
            place_id = image_id
        else:
            image_id = num_rows + row
            place_id = row
        images.append(_Image("test", "ANU_data_test", name, image_id, place_id))
    return images


@dataclass(frozen=True)
class _Mat:
    """The contents of ACT_data.mat: names[N], utm[N, 2] metres, and 0-based rows of each split."""

    uri: str
    names: list[str]
    utm: Floats64
    sets: dict[str, list[int]]

    @classmethod
    def read(cls, source_folder: SourceFolder) -> _Mat:
        uri = source_folder.join(MAT)
        wanted = ["panoIds", "utm", *SETS.values()]
        try:
            # Any: scipy's stubs accept paths only
            stream: Any = io.BytesIO(source_folder.read_bytes(MAT))
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
        names = [_name_text(entry) for entry in np.ravel(found["panoIds"])]
        if not names:
            raise empty_list_error(uri)
        utm = np.asarray(found["utm"], dtype=np.float64)
        if utm.shape != (len(names), 2):
            raise InputError(
                f"{uri}: utm has shape {utm.shape}, but {len(names)} panoIds need ({len(names)}, 2)"
            )
        sets = {
            split: _parse_rows(uri, name, found[name], len(names)) for split, name in SETS.items()
        }
        return cls(uri, names, utm, sets)

    def compute_degrees(self, rows: Ints) -> list[tuple[float, float]]:
        """Return WGS84 latitude and longitude of rows[M].

        utm holds easting and northing, in either order. Raises InputError for a row outside the
        zone's range.
        """
        # one order for the whole file, by the median of all rows: a single faulty row is refused
        northing_first = bool(np.nanmedian(self.utm[:, 0]) > NORTHINGS_M[0])
        easting = self.utm[rows, 1 if northing_first else 0]
        northing = self.utm[rows, 0 if northing_first else 1]
        inside = (northing > NORTHINGS_M[0]) & (northing < NORTHINGS_M[1])
        inside &= (easting > EASTINGS_M[0]) & (easting < EASTINGS_M[1])
        if not inside.all():
            row = int(rows[~inside][0])
            raise InputError(
                f"{self.uri}: utm row {row + 1} is {self.utm[row].tolist()}; it must be an easting"
                " of 100,000 to 900,000 m and a northing of 1,000,000 to 10,000,000 m, in the same"
                " order in every row"
            )
        transformer = Transformer.from_crs("EPSG:32755", "EPSG:4326", always_xy=True)
        lon, lat = transformer.transform(easting, northing)
        return list(zip(np.asarray(lat).tolist(), np.asarray(lon).tolist(), strict=True))


def _name_text(entry: Any) -> str:
    """Return a panorama's name as a string.

    `entry` is a cell (an array of one string) or a row of a character matrix (padded).
    """
    while isinstance(entry, np.ndarray) and entry.size == 1:
        entry = entry.item()
    return str(entry).strip()


def _parse_rows(uri: str, name: str, struct: Any, num_rows: int) -> list[int]:
    """Return the 1-based rows that a struct lists, as 0-based rows.

    Reads the field trainInd or valInd, or else the second one. Raises InputError for another
    structure, and for a value that is not a row.
    """
    fields: tuple[str, ...] = struct.dtype.names or ()
    field = name.removesuffix("Set") + "Ind"
    if struct.size != 1 or (field not in fields and len(fields) < 2):
        raise InputError(
            f"{uri}: {name} is not one struct with a field {field}, 1-based rows; it has {fields}"
        )
    index = fields.index(field) if field in fields else 1
    listed = np.ravel(struct.item()[index])
    if listed.dtype.kind not in "iuf":
        raise InputError(f"{uri}: {name}.{fields[index]} does not hold numbers; restore the file")
    numbers = listed.astype(np.float64)
    faulty = ~((numbers >= 1) & (numbers <= num_rows) & (numbers == np.floor(numbers)))
    if faulty.any():
        raise InputError(
            f"{uri}: {name}.{fields[index]} holds {listed[faulty][0]},"
            f" which is not a row of 1 to {num_rows}"
        )
    rows: list[int] = (numbers.astype(np.int64) - 1).tolist()
    return rows
