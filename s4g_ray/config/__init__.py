"""The run's configuration.

schema   every key with its type, unit, default and bounds; RunConfig
loading  YAML and key=value overrides into RunConfig; unknown keys named
"""
