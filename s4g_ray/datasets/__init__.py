"""Converters into the canonical data set, a module each."""
