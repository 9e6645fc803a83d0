"""S4g pack.

pack        s4g pack: write, resume and publish tar shards
layout      which image goes into which shard, in which order
tar_shards  reproducible tar files, verified after writing
s2_curve    S2 cell ids: places in order along a Hilbert curve
"""
