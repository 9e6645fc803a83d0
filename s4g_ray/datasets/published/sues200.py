"""Convert SUES-200: drone images of 200 places from four heights, and a satellite image of each.

Layouts as published (arXiv 2204.10704, github.com/Reza-Zhu/SUES-200-Benchmark): the archive, with
drone_view_512/PLACE/HEIGHT and satellite-view/PLACE; or as its script/split_datasets.py divides it,
with Training/HEIGHT and Testing/HEIGHT. The gallery holds all 200 places. The folders hold no
positions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from s4g_ray.data.dataset import GeoDataset, refuse_existing
from s4g_ray.datasets.published.archive_root import open_root
from s4g_ray.datasets.published.drone_folders import (
    VIEWS,
    PlaceImage,
    check_views,
    find_images,
    list_places,
    make_rows,
)
from s4g_ray.datasets.source import SourceFolder
from s4g_ray.errors import InputError
from s4g_ray.progress import Report, ignore_report
from s4g_ray.storage import files

HEIGHTS = ("150", "200", "250", "300")  # metres
ARCHIVE = {"drone": "drone_view_512", "satellite": "satellite-view"}
# the 120 places to train on: script/indexs.yaml of the published code
TRAIN_PLACES = frozenset(
    int(number)
    for number in re.findall(
        r"\d+",
        "1 2 3 4 5 6 7 9 10 11 13 15 16 20 21 24 25 26 27 28 29 30 31 32 33 34 36 37 39 43 44 45 "
        "51 55 56 57 58 60 64 66 67 69 70 73 74 76 77 80 81 82 84 85 86 87 88 89 90 91 94 96 97 "
        "100 101 102 103 104 105 106 113 116 118 119 120 123 125 126 127 129 132 134 137 139 141 "
        "142 145 146 147 148 149 151 152 155 156 157 158 159 160 163 166 167 168 169 171 174 179 "
        "180 182 183 184 185 186 187 191 192 193 196 197 198 199 200",
    )
)


def convert(
    source: str,
    target: str,
    *,
    query_view: str = "drone",
    reference_view: str = "satellite",
    heights: str = ",".join(HEIGHTS),
    strict: bool = False,
    report: Report = ignore_report,
) -> GeoDataset:
    """Convert a SUES-200 folder; images stay where they are.

    One view is drone, the other satellite. heights: of the drone images, metres, joined by commas;
    the region of a drone image is its height ("150 m"). A place is a numbered folder. The gallery
    of the test split holds the places to train on, too, as published. `strict` has no effect: no
    list names images that could be missing. Raises InputError for other views and heights, another
    layout, and a target that holds a data set.
    """
    check_views(query_view, reference_view)
    wanted = _parse_heights(heights)
    target = files.absolute(target)
    refuse_existing(target)
    divided = [
        f"{part}/{height}/{name}"
        for height in wanted
        for part, names in (
            ("Training", list(VIEWS)),
            ("Testing", [f"query_{query_view}", f"gallery_{reference_view}"]),
        )
        for name in names
    ]
    layouts = {"archive": list(ARCHIVE.values()), "divided": divided}
    source_folder, layout = open_root(source, layouts, report)
    archive = _Archive(source_folder, wanted, is_divided=layout == "divided")
    train = "train"
    references = archive.list_side(reference_view, train) + archive.list_side(
        reference_view, "gallery"
    )
    queries = archive.list_side(query_view, train) + archive.list_side(query_view, "query")
    return source_folder.write(
        target,
        make_rows(source_folder, archive.find(references)),
        make_rows(source_folder, archive.find(queries)),
        name=f"sues200_{query_view}_to_{reference_view}",
        views={"references": VIEWS[reference_view], "queries": VIEWS[query_view]},
        strict=strict,
    )


def _parse_heights(text: str) -> list[str]:
    heights = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for height in heights:
        if height not in HEIGHTS:
            raise InputError(f"--heights {text!r}: {height!r} is none of {', '.join(HEIGHTS)}")
    return heights


@dataclass(frozen=True)
class _Folder:
    place: str
    path: str
    split: str
    region: str | None


@dataclass(frozen=True)
class _Archive:
    """The folders of images in one of the two layouts."""

    source_folder: SourceFolder
    heights: list[str]
    is_divided: bool

    def list_side(self, view: str, side: str) -> list[_Folder]:
        """Return the folders of a view: of side train, query (not train) or gallery (all)."""
        heights: Sequence[str | None] = self.heights if view == "drone" else [None]
        return [folder for height in heights for folder in self._list_height(view, side, height)]

    def _list_height(self, view: str, side: str, height: str | None) -> list[_Folder]:
        split = "train" if side == "train" else "test"
        region = f"{height} m" if height else None
        above = self._folder_above(view, side, height or self.heights[0])
        folders = []
        for place in list_places(self.source_folder, above, "place"):
            if not self.is_divided and not _is_of_side(int(place), side):
                continue
            path = f"{above}/{place}"
            if not self.is_divided and height:
                path = f"{path}/{height}"
            folders.append(_Folder(place, path, split, region))
        return folders

    def _folder_above(self, view: str, side: str, height: str) -> str:
        if not self.is_divided:
            return ARCHIVE[view]
        if side == "train":
            return f"Training/{height}/{view}"
        return f"Testing/{height}/{side}_{view}"

    def find(self, folders: Sequence[_Folder]) -> list[PlaceImage]:
        """Return the images of folders, in their order."""
        found = find_images(self.source_folder, [folder.path for folder in folders])
        return [
            PlaceImage(int(folder.place), path, folder.split, folder.region)
            for folder, paths in zip(folders, found, strict=True)
            for path in paths
        ]


def _is_of_side(place: int, side: str) -> bool:
    return side == "gallery" or (place in TRAIN_PLACES) == (side == "train")
