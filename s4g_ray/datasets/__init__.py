"""Make, check and pack data sets.

source          what the converters share: listings, layouts, missing images
cvusa           CVUSA
cvact           CVACT
vigor           VIGOR
university1652  University-1652
folder          a folder of images with two CSV files
earth           Blue Marble and relief tiles, from a package
inspection/     s4g check
packing/        s4g pack
"""
