"""Turn the values of image files into bytes: one conversion for all that reads images.

image_values  ImageValues: the stretch and the bands of a data set's images
stretch       Stretch: how the values of a raster become bytes
raw_values    read the values of files that do not hold bytes of brightness
"""
