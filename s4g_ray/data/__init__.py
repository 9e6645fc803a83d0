"""Read data sets: their tables, places, pairs and images.

schema        columns, views, splits and protocols of the canonical data set
image_table   ImageTable: the images of the chosen rows, and where they are stored
validation    the checks of a data set: errors name file, row and remedy
pairs         PairTable: query and reference of one place
dataset       GeoDataset, open_dataset and write_dataset
sphere        degrees, unit vectors and great-circle metres
places        Places: ids and coordinates
area          Area: circles, bounds and polygons, and the points in them
exclusions    Exclusions: places that are never negatives of each other
train_split   TrainSplit: pairs, places, exclusions and gallery of a run, read once
images        read, decode and resize images
pair_loader   PairLoader: load batches ahead of training, by threads or processes
photos/       find photos, and read what their files say of themselves
batches/      make training batches: sources, augmentation in the loader or on a device
format/       dataset.json, columns, paths and fingerprint of a data set
pixels/       values of images into bytes
tables/       the tables by which packages meet

    dataset = open_dataset("data/mine")
    pairs = dataset.pairs("train")
    images = dataset.table("queries", ["test"])
"""
