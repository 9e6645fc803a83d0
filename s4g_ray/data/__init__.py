"""The data set, its places and images.

schema        columns, views and splits of the canonical data set
image_table   ImageTable: where the images of some rows lie
validation    what opening a data set refuses: file, row and remedy
dataset       GeoDataset: open_dataset, write_dataset
pairs         PairTable: query and reference of one place
train_split   TrainSplit: pairs, places, exclusions and gallery of a run, read once
sphere        degrees, unit vectors, great-circle metres
places        Places: ids and coordinates
exclusions    Exclusions: places that are never negatives of each other
images        read, decode and resize images
augmentation  augmentation, consistent across the two views of a pair
pair_loader   PairLoader: batches loaded ahead by threads or processes
tables/       the tables by which packages meet
"""
