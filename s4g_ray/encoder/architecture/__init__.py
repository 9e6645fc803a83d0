"""Shape an encoder: its backbone, its head, its layers and the sizes of images that it takes.

backbone          create timm backbones with model.options; compute shapes without data
head              model.head: the layers between a backbone and its embeddings
parameter_groups  frozen stages; the layer of each parameter, for layer-wise learning rates
size_check        check that the encoder takes the configured sizes of images
"""
