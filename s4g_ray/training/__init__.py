"""Train an encoder on batch plans, and publish checkpoints.

loss            symmetric_info_nce, exact across ranks
gradient_cache  the gradient of batches larger than memory, in chunks (GradCache)
step            TrainingStep: gradients, clipping and learning rate of one step
mailbox         the actor that carries messages between driver and workers
epoch_totals    EpochTotals: the metrics of an epoch, summed over its steps
worker          the function that a Ray Train worker runs: epochs of batch plans
worker_group    what happens to all workers: placement, losses, nodes that are drained
trainer         Training: start the workers, and follow them on the driver

Example:
    training = Training(config, numerics)
    training.post_plan(1, "runs/mine/plans/epoch=0001.parquet")
    messages = training.take()
"""
