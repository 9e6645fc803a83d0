"""Define the commands that change what dataset.json says of a data set.

images  `s4g convert relocate` and `s4g convert stretch`: where images are, and how they are shown
"""
