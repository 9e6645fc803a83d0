"""S4g check.

dataset_checks  s4g check: every check and its finding
inventory       rows and image files of a data set as arrays
findings        Finding, and the table that shows them
"""
