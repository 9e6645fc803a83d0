"""The run.

driver            run(): the epochs of a run, from configuration to run folder
run_log           workers' messages into metrics.jsonl and lines
precision_choice  measure precisions where a worker would run
planner           the batch plan of each epoch
preflight         what is refused before a run starts
run_folder        RunFolder: run.json, config.yaml, metrics.jsonl, artefacts
preemption        SIGTERM
prometheus        what a run exports through Ray's metrics
rounds/           mining rounds beside training
report/           report.html
stages/           single stages: s4g embed, mine, evaluate
"""
