"""Turn images into embeddings.

encoder           Encoder: one timm backbone for both views or one for each, and the logit scale
architecture/     backbones, heads, layers and admissible sizes of images
weights           load and save state dicts strictly
weights_file      find a file of weights, without torch
pretrained        load weights from elsewhere: prefixes, classifiers, the published forms
checkpoint        publish, find and prune the checkpoints of a run
training_state    the state of optimiser and gradient scaler in a checkpoint
precision         Numerics: precision and memory format, chosen by measuring
source            open a run, an export or a weights file as an encoder
export            s4g export: model.safetensors, model.pth and model.json
actors            EncoderPool: Ray actors that encode, warm from one job to the next
embedding/        blocks and parts of an embedding table: planned, decoded ahead, encoded, joined
embedding_job     embed(): a checkpoint and images into an embedding table, block by block

Example:
    source = open_source("runs/mine", "data/mine")
    encoder = load_encoder(source.config.model, source.checkpoint)
    embeddings = encoder.embed(images, "queries")  # uint8 [b, 3, H, W] -> [b, D]
"""
