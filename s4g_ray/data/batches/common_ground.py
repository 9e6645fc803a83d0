"""Compute the share of ground that squares have in common, and find the squares of a batch.

A square is (lat, lon, side): its centre in degrees, and its side in metres, north up; NaN where
unknown. A tile shows the square of its size_m. A query's square is as large as that of its own tile
and lies around the query's own position, or around its tile's where it has none.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from s4g_ray.arrays import Floats64, Ints
from s4g_ray.data.image_table import ImageTable
from s4g_ray.data.sphere import METRES_A_DEGREE


def find_pair_ground(
    queries: ImageTable, references: ImageTable, query_ids: Ints, reference_ids: Ints
) -> Floats64:
    """Return the squares [b, 6] of pairs: the query's, then its reference's.

    NaN for an id of -1. Raises KeyError for an unknown id.
    """
    found = np.full((len(query_ids), 6), np.nan)
    filled = np.flatnonzero(query_ids >= 0)
    tiles = find_gallery_ground(references, reference_ids[filled])
    rows = queries.rows(query_ids[filled])
    lat = queries.lat[rows]
    lon = queries.lon[rows]
    has_position = np.isfinite(lat)
    found[filled, 0] = np.where(has_position, lat, tiles[:, 0])
    found[filled, 1] = np.where(has_position, lon, tiles[:, 1])
    found[filled, 2] = tiles[:, 2]
    found[filled, 3:] = tiles
    return found


def find_gallery_ground(references: ImageTable, ids: Ints) -> Floats64:
    """Return the squares [e, 3] of references. NaN and KeyError as find_pair_ground."""
    found = np.full((len(ids), 3), np.nan)
    filled = np.flatnonzero(ids >= 0)
    rows = references.rows(ids[filled])
    found[filled, 0] = references.lat[rows]
    found[filled, 1] = references.lon[rows]
    found[filled, 2] = references.sizes[rows]
    return found


def share_common_ground(first: Tensor, second: Tensor) -> Tensor:
    """Return the ground that squares have in common over that which either shows, in 0..1.

    first[..., 3] and second[..., 3] float64 broadcast to the shape of the result. 0 where a square
    is unknown. Distances are measured on a plane that touches the sphere between the centres.
    """
    lat_a, lon_a, side_a = first.unbind(-1)
    lat_b, lon_b, side_b = second.unbind(-1)
    east = torch.remainder(lon_b - lon_a + 180, 360) - 180
    east = east * torch.cos(torch.deg2rad((lat_a + lat_b) / 2))
    common = torch.ones_like(east)
    for degrees in (lat_b - lat_a, east):
        reach = (side_a + side_b) / 2 - degrees.abs() * METRES_A_DEGREE
        common = common * torch.minimum(reach, torch.minimum(side_a, side_b)).clamp(min=0)
    return torch.nan_to_num(common / (side_a**2 + side_b**2 - common))
