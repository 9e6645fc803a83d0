"""Train an encoder on batch plans, and publish checkpoints.

loss               symmetric_info_nce, exact across ranks; targets shared by common ground
gradient_cache     the gradient of batches larger than memory, in chunks (GradCache)
optimizer          AdamW over groups of parameters, the learning rate, averaged weights
step               TrainingStep: gradients, clipping and update of one step
prefetch           batches moved to the device one ahead
compilation        torch.compile of the encoder, or a message and none
checkpoint_writer  checkpoints published by a thread
metrics/           metrics of an epoch, summed over its steps and ranks; speed
mailbox            the actor that carries messages between driver and workers
failures           errors of a worker that end the run
worker             the function that a Ray Train worker runs: epochs of batch plans
worker_group       what Ray Train's controller tells of its workers
trainer            Training: start the workers, and follow them on the driver

Example:
    training = Training(config, numerics)
    training.post_plan(1, "runs/mine/plans/epoch=0001.parquet")
    messages = training.take()
"""
