"""Define and load the configuration of a run.

schema   every key with its type, unit, default and bounds; RunConfig
loading  YAML and key=value overrides into RunConfig; errors name unknown keys

Load a configuration with an override, and read a key:

    config = load_config("configs/earth.yaml", ["train.epochs=3"])
    config.train.epochs
"""
