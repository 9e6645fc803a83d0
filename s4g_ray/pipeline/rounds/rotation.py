"""Choose the places that a round of mining.refresh=rotate embeds and mines. Pure.

Places are cut into blocks of neighbors on the ground, each of the same number of places. A cycle of
rounds takes each block once, in an order that is drawn anew for each cycle.
"""

from __future__ import annotations

import math

import numpy as np

from s4g_ray.arrays import Ints
from s4g_ray.config.schema import MiningConfig
from s4g_ray.data.places import Places
from s4g_ray.data.sphere import unit_sphere
from s4g_ray.sampling.place_tree import curve_order

# Of a round: with fewer, a share is few regions, which the model may know unevenly; with more,
# more places have neighbors in another block, which they are not compared with in that round.
BLOCKS_A_SHARE = 8
_STREAM = 0x726F7461  # of the order in which a cycle takes the blocks


def round_number(cfg: MiningConfig, epoch: int) -> int:
    """Return the number of the mining round after an epoch, counted from 0: the full one."""
    return epoch // cfg.every_epochs - 1


def count_shares(cfg: MiningConfig) -> int:
    """Return the rounds of a cycle, in which each place is taken once."""
    return math.ceil(1 / cfg.refresh_share - 1e-9)


def smallest_share(cfg: MiningConfig, num_places: int) -> int:
    """Return the number of places that each round takes at least."""
    num_shares = count_shares(cfg)
    num_blocks = _count_blocks(num_shares, num_places)
    return num_blocks // num_shares * (num_places // num_blocks)


def choose_places(places: Places, cfg: MiningConfig, number: int, *, seed: int) -> Ints:
    """Return the ids, ascending, of the places that a round takes; number: 1 or more.

    A function of the places, the share, the number and the seed.
    """
    num_shares = count_shares(cfg)
    cycle, position = divmod(number - 1, num_shares)
    num_blocks = _count_blocks(num_shares, len(places))
    drawn = np.random.default_rng((seed, cycle, _STREAM)).permutation(num_blocks)
    # places without coordinates follow each other too
    xyz = unit_sphere(places.lat, places.lon)
    order = curve_order(np.nan_to_num(xyz, copy=False))
    takes_block = np.zeros(num_blocks, dtype=bool)
    takes_block[drawn[position::num_shares]] = True
    edges = len(places) * np.arange(num_blocks + 1) // num_blocks
    is_taken = np.repeat(takes_block, np.diff(edges))
    return np.sort(places.ids[order[is_taken]])


def _count_blocks(num_shares: int, num_places: int) -> int:
    return max(1, min(num_shares * BLOCKS_A_SHARE, num_places))
