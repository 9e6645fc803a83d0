"""Write and read the format of a data set: its header, columns, paths and fingerprint.

header        DatasetHeader: dataset.json, with the parts that the data set consists of
columns       cast tables to the schema of a view; errors name column, row and remedy
image_paths   paths of images, stored relative to a folder that may move
moved_images  look for a sample of images below the folder that is named for them anew
rows_digest   RowsDigest: the fingerprint of rows, wherever their images are
"""
