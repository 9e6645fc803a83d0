"""Images into embeddings.

encoder        Encoder: one timm backbone for both views, and the logit scale
weights        load and save state dicts strictly; published forms
precision      Numerics: precision and memory format, measured
checkpoint     publish, find and prune checkpoints; load_encoder
export         s4g export: safetensors, .pth and model.json
source         open a run, an export or a weights file as an encoder
actors         EncoderPool: actors that embed, warm between rounds
embedding_job  Ray Data: checkpoint and images into an embedding table
"""
