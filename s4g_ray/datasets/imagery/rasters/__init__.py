"""Read rasters of any kind: a window of pixels, and which of them hold data.

file_versions  whether files have changed
georeference   where the pixels of a raster lie on the Earth, and back
raster         what GDAL reads: GeoTIFF, COG, VRT, JPEG 2000; local or in an object store
stac           the assets of a STAC item collection
tile_pyramids  pyramids of web mercator tiles as rasters
tile_stores    their tiles: MBTiles, PMTiles, folders Z/X/Y.EXT
"""
