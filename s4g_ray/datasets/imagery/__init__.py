"""Cut tiles of equal ground size out of georeferenced imagery.

world_grid      WorldGrid: the cells of a grid over the Earth; ids that never change
sources         open_imagery: files, folders, lists and catalogs into one Imagery
imagery         Imagery: rasters in order, their extent, footprint and resolution; find_cells
georeference    where the pixels of a raster lie on the Earth, and back
rasters         rasters that GDAL reads: GeoTIFF, COG, VRT, JPEG 2000; local or in a store
tile_pyramids   MBTiles, PMTiles and folders of web mercator tiles
stac            the assets of a STAC item collection
stretch         Stretch: 16-bit and float values into bytes
resampling      compiled: pixels of a window into a tile
tile_reader     read_tiles: cells into tiles, one window a block, one resampling a tile

    imagery = open_imagery("ortho/*.tif")
    cells = find_cells(imagery, WorldGrid(size_m=60))
    for tile in read_tiles(imagery, cells, pixels=384, stretch=choose_stretch(imagery)):
        ...
"""
