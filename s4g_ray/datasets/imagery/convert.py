"""Convert imagery: cut the cells of a world grid out of it, into a data set of references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from s4g_ray.data.area import Area
from s4g_ray.data.dataset import GeoDataset, refuse_existing
from s4g_ray.datasets.imagery.cutting.region import CutOptions, GridPart, TileSource, cut_region
from s4g_ray.datasets.imagery.sources import open_imagery
from s4g_ray.datasets.imagery.stretch import Stretch
from s4g_ray.datasets.imagery.tile_reader import read_tiles
from s4g_ray.datasets.imagery.world_grid import Bounds, WorldGrid
from s4g_ray.errors import InputError
from s4g_ray.progress import Update, ignore
from s4g_ray.storage import files
