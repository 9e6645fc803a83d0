"""Lists as spreadsheets, databases and Google write them give the rows of the plain list."""

from __future__ import annotations

import csv
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from s4g_ray.datasets.lists import list_files
from s4g_ray.datasets.lists.dialects import SAMPLE_BYTES, Dialect
from s4g_ray.datasets.lists.image_lists import ImageList
from s4g_ray.datasets.lists.list_files import CsvList, ParquetList
from s4g_ray.datasets.lists.list_options import ListOptions
from s4g_ray.errors import InputError

OPTIONS = ListOptions(heading_column="heading")
HEADER = ["path", "lat", "lon", "heading", "note"]
ROWS = [
    ["p/Ström 1.jpg", "41.5", "-112.1234567", "7.25", "north; of | the lake"],
    ["p/2.jpg", "-0.0000001", "179", "", ""],
    ["p/3.jpg", "40", "-112.5", "359.5", "x"],
]
LAT = [41.5, -0.0000001, 40.0]
LON = [-112.1234567, 179.0, -112.5]
HEADING = [7.25, np.nan, 359.5]


def write(
    delimiter: str = ",",
    *,
    decimal: str = ".",
    line_end: str = "\r\n",
    encoding: str = "utf-8",
    quoting: Any = csv.QUOTE_MINIMAL,
    header: list[str] | None = None,
    before: str = "",
) -> bytes:
    """Write ROWS in a dialect."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter, lineterminator=line_end, quoting=quoting)
    writer.writerow(header or HEADER)
    for path, *numbers, note in ROWS:
        writer.writerow([path, *(text.replace(".", decimal) for text in numbers), note])
    return (before + buffer.getvalue()).encode(encoding)


def write_e7(delimiter: str, names: list[str], group: str = "") -> bytes:
    """Write ROWS with coordinates in whole ten-millionths of a degree."""
    lines = [delimiter.join(["path", *names, "heading"])]
    for (path, *_, heading, _), lat, lon in zip(ROWS, LAT, LON, strict=True):
        whole = [f"{round(value * 1e7):,}".replace(",", group) for value in (lat, lon)]
        lines.append(delimiter.join([path, *whole, heading]))
    return "\n".join(lines).encode()


PLAIN: list[str] = []
SEMICOLON = ["columns are separated by ';'"]
COMMA = ["decimals are written with ','"]
E7 = ["coordinates are whole ten-millionths of a degree (E7)"]
DIALECTS: dict[str, tuple[bytes, list[str]]] = {
    "plain": (write(line_end="\n"), PLAIN),
    "quoted": (write(quoting=csv.QUOTE_ALL), PLAIN),
    "semicolons": (write(";"), SEMICOLON),
    "pipes": (write("|", line_end="\n"), ["columns are separated by '|'"]),
    "tabs": (write("\t"), ["columns are separated by tabs"]),
    "European": (write(";", decimal=","), [*SEMICOLON, *COMMA]),
    "tabs and decimal commas": (
        write("\t", decimal=","),
        ["columns are separated by tabs", *COMMA],
    ),
    "quoted decimal commas": (write(decimal=","), COMMA),
    "Excel's UTF-8": (write(";", decimal=",", encoding="utf-8-sig"), [*SEMICOLON, *COMMA]),
    "Excel's Unicode text": (
        write("\t", encoding="utf-16"),
        ["the text is UTF-16", "columns are separated by tabs"],
    ),
    "UTF-16 without a mark": (write(encoding="utf-16-le"), ["the text is UTF-16-LE"]),
    "big-endian UTF-16 without a mark": (
        write(encoding="utf-16-be"),
        ["the text is UTF-16-BE"],
    ),
    "Excel's hint": (write(";", before="sep=;\r\n"), SEMICOLON),
    "old Macintosh": (write(";", line_end="\r"), SEMICOLON),
    "blank lines first": (write(before="\n\n"), PLAIN),
    "header case and spaces": (
        write(header=[" Path", "LAT ", "Lon", "Head ing", "note"]),
        PLAIN,
    ),
    "Takeout": (write_e7(",", ["latitudeE7", "longitudeE7"]), E7),
    "E7 by name": (write_e7("\t", ["lat_e7", "lon_e7"]), ["columns are separated by tabs", *E7]),
    "E7 by value": (write_e7(",", ["lat", "lon"]), E7),
    "E7 with thousands": (write_e7(";", ["lat", "lon"], "."), [*SEMICOLON, *E7]),
    "E7 with narrow spaces": (write_e7(";", ["lat", "lon"], "\u202f"), [*SEMICOLON, *E7]),
}


def read(data: bytes, options: ListOptions = OPTIONS) -> tuple[ImageList, list[str]]:
    """Return the rows of a list of queries, and how it is described."""
    reader = CsvList("q.csv", io.BytesIO(data), "queries", options)
    return ImageList.from_chunks(reader, list(reader.read())), reader.describe()


def check(images: ImageList) -> None:
    assert images.column("path").to_pylist() == [row[0] for row in ROWS]
    np.testing.assert_array_equal(images.lat, LAT)
    np.testing.assert_array_equal(images.lon, LON)
    np.testing.assert_array_equal(images.headings, np.array(HEADING, np.float32))


@pytest.mark.parametrize("block_bytes", [32, 10**6])
@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_gives_the_rows_of_the_plain_list(
    name: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(list_files, "BLOCK_BYTES", block_bytes)
    data, described = DIALECTS[name]
    images, found = read(data)
    check(images)
    assert found == described
    encoding = Dialect.from_sample(data, "queries", OPTIONS).encoding
    pathless = data.decode(encoding).replace("p/3.jpg", "").encode(encoding)
    with pytest.raises(InputError, match=r"q\.csv, line \d+: [pP]ath is empty"):
        read(pathless)


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_dialects_with_a_delimiter_are_parsed_by_arrow(
    delimiter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_parsed = 0

    def parse(*args: Any) -> Any:
        nonlocal num_parsed
        table = pacsv.read_csv(*args)
        num_parsed += len(table)
        return table

    monkeypatch.setattr(list_files, "pacsv", SimpleNamespace(**{**vars(pacsv), "read_csv": parse}))
    quoted = write(delimiter, decimal=",", line_end="\n")
    check(read(quoted.replace(b"north; of | the lake", b"north").replace(b'"', b""))[0])
    assert num_parsed == 3


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("path;lat;lon\na;41,5;1,234.5", {}, r"lat='41,5' is not a number; .* give --decimal ,"),
        (
            "path;lat;lon\na;1.5;2.5",
            {"decimal": ","},
            "1.5. is not .*decimal commas",
        ),
        ("path;lat;lon\na;1;2", {"delimiter": ","}, "no column 'path'"),
        ("path,lat,lon\na,41,5,112,3", {}, "has 5 fields, but the header has 3"),
        ("path,lat,LAT,lon\na,1,2,3", {"lat_column": "Lat"}, "columns 'lat' and 'LAT' could"),
        ("path,lat,lat,lon\na,1,2,3", {}, "columns 'lat' and 'lat' could each be 'lat'"),
        # metres of a projection are neither degrees nor ten-millionths of them
        ("path,lat,lon\na,4578000,412000", {}, r"4578000\.0, 412000\.0 is not within"),
        # millionths of a degree: could be ten-millionths of others
        (
            "path,lat,lon\na,48137154,11576124\nb,-90000000,180000000",
            {},
            r"line 2: 48137154\.0, 11576124\.0 is not within .*name the columns latitudeE7 and",
        ),
        ("path,lat,lon\na,112,41", {}, r"112\.0, 41\.0 is not within .*; .* look swapped"),
        ("path,latE7,lonE7\na,415000000,41.5", {}, r"lonE7='41\.5' is not a number of E7"),
        ("\xff\xfep\0a\0t\0h\0,\0l", {}, "begins as utf-16 text, and is not: truncated data"),
    ],
)
def test_what_no_dialect_explains_is_refused(
    text: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read(text.encode("latin-1"), ListOptions(**options))


def test_a_name_says_that_small_numbers_are_ten_millionths_of_a_degree() -> None:
    images, _ = read(b"path,latitudeE7,longitudeE7\na,65000000,33000000", ListOptions())
    assert (images.lat.tolist(), images.lon.tolist()) == ([6.5], [3.3])


@pytest.mark.parametrize("position", ["90000001,1", "1,-180000001"])
def test_one_number_too_large_for_millionths_tells_ten_millionths(position: str) -> None:
    text = f"path,lat,lon\na,65000000,33000000\nb,48137154,33000000\nc,{position}"
    images, _ = read(text.encode(), ListOptions())
    assert (images.lat[0], images.lon[0]) == (6.5, 3.3)


def test_options_decide_where_a_sample_can_mean_either() -> None:
    text = b"path|lat;lon|lat|lon\na|1|2|3"
    images, _ = read(text, ListOptions(delimiter="pipe"))
    assert (images.lat.tolist(), images.lon.tolist()) == ([2.0], [3.0])


def test_a_comma_beyond_the_sample_is_refused_with_its_line_and_the_remedy() -> None:
    lines = ["path;lat;lon", *["a;1;2"] * (SAMPLE_BYTES // 6 + 1), "b;1,5;2"]
    with pytest.raises(InputError, match=rf"line {len(lines)}: lat='1,5' .*decimal"):
        read("\n".join(lines).encode(), ListOptions())


@pytest.mark.parametrize(
    ("lat", "lon"),
    [
        (pa.array(LAT), pa.array(LON)),
        (pa.array(["41,5", "-0,0000001", "40"]), pa.array(["-112,1234567", "179", "-112,5"])),
        (pa.array([415000000, -1, 400000000]), pa.array([-1121234567, 1790000000, -1125000000])),
    ],
)
def test_numbers_of_parquet_lists_are_read_alike(lat: pa.Array, lon: pa.Array) -> None:
    table = {"Path": [row[0] for row in ROWS], "Lat": lat, "Lon": lon, "heading": HEADING}
    buffer = io.BytesIO()
    pq.write_table(pa.table(table).filter(pa.array([True] * 3)), buffer)
    buffer.seek(0)
    reader = ParquetList("q.parquet", buffer, "queries", ListOptions())
    images = ImageList.from_chunks(reader, list(reader.read()))
    np.testing.assert_array_equal(images.lat, LAT)
    np.testing.assert_array_equal(images.lon, LON)
