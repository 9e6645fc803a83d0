"""Read the lists of a folder's images, and pair them, for `s4g convert folder`.

list_options    how lists are written, their columns named, and pairs made
dialects        how a CSV file is written: encoding, line ends, delimiter
column_names    the columns of a list by their names, as users write them
number_format   numbers with decimal commas, or in ten-millionths of a degree
list_columns    the columns of a list: found, and parsed by Arrow or row by row
list_files      a list in CSV or Parquet, read in chunks
image_lists     the lists of a folder, whole, as columns
exif_positions  positions and headings from the photos' own tags
file_names      names of files that are not UTF-8
name_matching   files whose names are written otherwise than in the list
pairing         which tile is a query's place; what is tested
pair_distances  how far queries lie from their tiles; what is refused
"""
