"""The run: from a configuration to a folder of artefacts.

run               run(): check the input, then train in the run's folder
driver            the epochs of a run, with rounds between or beside them
preflight         checks before a run starts
planner           the batch plan of each epoch
precision_choice  choose the precision, measured where a worker would run
run_log           workers' messages into metrics.jsonl and lines
records           typed records: the lines of metrics.jsonl
callbacks         callbacks that receive them
run_folder        RunFolder: run.json, config.yaml, metrics.jsonl, artefacts
run_start         whether a run may start in a folder
preemption        SIGTERM
prometheus        records of a run as Ray metrics
branches/         continue from an earlier checkpoint with other values
retention/        remove what a run does not need any more
budget/           disk, memory and hours of a run, before it starts
loggers/          TensorBoard, Weights & Biases, MLflow
rounds/           mining and evaluation rounds
report/           report.html
stages/           single stages: s4g embed, mine, evaluate

from s4g_ray import load_config, run
result = run(load_config("configs/earth.yaml"))
print(result.metrics["recall@1"])
"""
