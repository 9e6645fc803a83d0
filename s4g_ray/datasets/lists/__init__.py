"""Read the lists of a folder's images, for `s4g convert folder`.

list_columns  the columns of a list: found, and parsed by Arrow or row by row
list_files    a list in CSV or Parquet, read in chunks
image_lists   the lists of a folder, whole, as columns
"""
