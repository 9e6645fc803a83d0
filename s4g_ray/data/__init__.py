"""Read data sets: their tables, places, pairs and images.

schema        columns, views, splits and protocols of the canonical data set
image_table   ImageTable: the images of the chosen rows, and where they are stored
validation    the checks of a data set: errors name file, row and remedy
pairs         PairTable: query and reference of one place
dataset       GeoDataset, open_dataset and write_dataset
sphere        degrees, unit vectors and great-circle metres
places        Places: ids and coordinates
exclusions    Exclusions: places that are never negatives of each other
train_split   TrainSplit: pairs, places, exclusions and gallery of a run, read once
images        read, decode and resize images
augmentation  augment images, consistently across the two views of a pair
pair_loader   PairLoader: load batches ahead of training, by threads or processes
batches/      make training batches: sources, draws, augmentation on a device
tables/       the tables by which packages meet

    dataset = open_dataset("data/mine")
    pairs = dataset.pairs("train")
    images = dataset.table("queries", ["test"])
"""
