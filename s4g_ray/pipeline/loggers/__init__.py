"""Loggers: the records of a run in TensorBoard, Weights & Biases and MLflow.

run_loggers         open those that are configured, and hand each record to all of them
logger_checks       check their packages, logins and stores before a run starts
points              records as named numbers at a step
feed                write points in a thread: once each, again after a failure
pictures            retrievals as pictures
tensorboard_logger  event files in the run's folder
wandb_logger        a run of Weights & Biases
mlflow_logger       a run of MLflow

loggers: [tensorboard, wandb]  # in a configuration
"""
