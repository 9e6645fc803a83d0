"""Define commands of `s4g convert`.

run_converter  run a converter: its progress, its notes and its result
folder         a folder of images, and lists of them
published      SUES-200, DenseUAV, GTA-UAV, UAV-VisLoc and CV-Cities
"""
