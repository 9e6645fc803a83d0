from __future__ import annotations

import numpy as np

from s4g_ray.data.sphere import metres_between
from s4g_ray.datasets.packing.s2_curve import cell_ids, order_along_curve

# cases from the tests of Google's S2 library: leaf cell, latitude, longitude
PUBLISHED = [
    (0x47A1CBD595522B39, 49.703498679, 11.770681595),
    (0x46525318B63BE0F9, 55.685376759, 12.588490937),
    (0x52B30B71698E729D, 45.486546517, -93.449700022),
    (0x46ED8886CFADDA85, 58.299984854, 23.049300056),
    (0x3663F18A24CBE857, 34.364439040, 108.330699969),
    (0x10A06C0A948CF5D, -30.694551352, -30.048758753),
    (0x2B2BFD076787C5DF, -25.285264027, 133.823116966),
    (0xB09DFF882A7809E1, -75.000000031, 0.000000133),
    (0x94DAA3D000000001, -24.694439215, -47.537363213),
    (0x87A1000000000001, 38.899730392, -99.901813021),
    (0x4FC76D5000000001, 81.647200334, -55.631712940),
    (0x3B00955555555555, 10.050986518, 78.293170610),
    (0x1DCC469991555555, -34.055420593, 18.551140038),
    (0xB112966AAAAAAAAB, -69.219262171, 49.670072392),
]


def test_cells_are_those_of_the_s2_library() -> None:
    cells, lat, lon = zip(*PUBLISHED, strict=True)
    # 5 of the 6 faces; the last test of this file shows that no face is out of place
    assert len({cell >> 61 for cell in cells}) == 5
    assert [hex(cell) for cell in cell_ids(np.array(lat), np.array(lon))] == [
        hex(cell) for cell in cells
    ]


def test_rows_without_coordinates_come_last_by_id_and_rows_of_one_cell_are_by_id() -> None:
    lat = np.array([1.0, np.nan, 1.0, np.nan, 1.0])
    lon = np.array([2.0, np.nan, 2.0, np.nan, 2.0])
    assert order_along_curve(np.array([9, 4, 7, 3, 8]), lat, lon).tolist() == [2, 4, 0, 3, 1]


def test_consecutive_places_are_near_each_other() -> None:
    rng = np.random.default_rng(0)
    lat = np.degrees(np.arcsin(rng.uniform(-1, 1, 20_000)))
    lon = rng.uniform(-180, 180, 20_000)
    order = order_along_curve(np.arange(20_000), lat, lon)
    metres = metres_between(lat[order[1:]], lon[order[1:]], lat[order[:-1]], lon[order[:-1]])
    spacing = np.sqrt(4 * np.pi * 6_371_000**2 / 20_000)
    assert np.median(metres) < spacing
    # the curve has no jumps; a sorted column jumps half around the globe
    assert metres.max() < 20 * spacing
