"""Find photos, and read what their files say of themselves.

photo_files  files, folders, globs and videos as a list of what is to be read
exif         ExifPosition: the position and heading that a photo's tags hold
heif         HEIC: told apart, and opened where pillow-heif is installed
"""
