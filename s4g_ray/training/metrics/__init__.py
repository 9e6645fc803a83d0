"""Measure an epoch: what its steps gave, and how fast they ran.

epoch_totals   EpochTotals and StepWindow: metrics summed over steps and ranks
skipped_steps  steps whose gradients are not finite, counted
instruments    time of a rank's own passes, TFLOP/s, GPU memory, profiler traces
"""
