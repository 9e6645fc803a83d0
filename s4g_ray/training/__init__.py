"""Batch plans into checkpoints.

loss            symmetric_info_nce, exact across ranks
gradient_cache  GradCache: batches larger than memory
step            one optimisation step: gradients, clipping, learning rate
worker          what a Ray Train worker runs: epochs of batch plans
trainer         TorchTrainer set-up, and its life on the driver
mailbox         the actor through which driver and workers talk
"""
