"""Cut tiles of equal ground size out of georeferenced imagery.

libraries    libraries that read imagery, an extra: its modules import it first
world_grid   WorldGrid: the cells of a grid over the Earth; ids that never change
sources      open_imagery: files, folders, lists and catalogs into one Imagery
rasters/     read a window of a raster of any kind
imagery      Imagery: rasters in order, their extent, footprint and resolution; find_cells
resampling   compiled: pixels of a window into a tile
tile_reader  read_tiles: cells into tiles, one window a block, one resampling a tile
cutting/     cut the cells of a grid into tar shards, and describe the region
convert      convert: `s4g convert imagery`

    imagery = open_imagery("ortho/*.tif")
    grid = WorldGrid(size_m=60)
    stretch = choose_stretch(imagery)
    for block in split_blocks(grid, find_cells(imagery, grid)):
        for tile in read_tiles(imagery, block, pixels=384, stretch=stretch):
            ...
"""
