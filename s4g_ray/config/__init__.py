"""Define and load the configuration of a run.

section          the base of all sections
data_schema      the keys of `data` and `augment`
training_schema  the keys of `model` and `train`
schema           the keys of the other sections; RunConfig
loading          YAML and key=value overrides into RunConfig; errors name unknown keys
shipped          the configurations that come with the package

Load a configuration with an override, and read a key:

    config = load_config("configs/earth.yaml", ["train.epochs=3"])
    config.train.epochs
"""
