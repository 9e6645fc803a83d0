"""Pack the images of a data set into tar shards, for `s4g pack`.

pack           write, resume and publish the shards, and the data set that refers to them
layout         which image goes into which shard, in which order, and its bytes
packed_tables  the rows of the packed data set, with byte ranges in the shards
tar_shards     reproducible tar files, verified after writing
s2_curve       S2 cell ids: places in order along a Hilbert curve

    from s4g_ray.datasets.packing.layout import PackOptions
    from s4g_ray.datasets.packing.pack import pack
    packed = pack("data/cvusa", "data/packed", PackOptions(query_size=(140, 768)))
"""
