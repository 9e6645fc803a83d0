"""Check the rows and images of a data set, for `s4g check`.

dataset_checks     run all checks on a data set
count_checks       filled columns, rows by view and split, places with one view only
coordinate_checks  extents, and distances of queries from their place
image_checks       missing, undecodable and repeated images
leakage_checks     val and test queries near train queries, or of their places
part_checks        the sha256 of the Parquet parts
relocation         give the folder of a data set's images anew
inventory          the rows of a data set as arrays, and distances between rows
image_files        list and decode the image files, several at a time
value_range        the range of values of images, written into dataset.json
findings           Finding, and the table that shows findings

    from s4g_ray.datasets.inspection.dataset_checks import inspect_dataset
    inspection = inspect_dataset("data/cvusa", decode=True)
"""
