"""Define the commands of `s4g convert` for published data sets.

run_converter  run a converter: its progress, its notes and its result
published      SUES-200, DenseUAV, GTA-UAV, UAV-VisLoc and CV-Cities
"""
